"""Barriers h = log p₊/p₋ on the sphere, and their fits."""
