"""Training of sparse autoencoders and transcoders."""
