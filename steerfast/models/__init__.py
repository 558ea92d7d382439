"""Models: their blocks and sites, their activations, their caches, and a small one to try things on."""
