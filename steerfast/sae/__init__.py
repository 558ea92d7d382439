"""Sparse autoencoders: the model, its formats, and steering with a whole dictionary."""
