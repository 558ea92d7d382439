"""Training of Top-K sparse autoencoders."""
