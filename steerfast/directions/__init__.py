"""Directions of the residual stream: made from activations, kept with their origin."""
