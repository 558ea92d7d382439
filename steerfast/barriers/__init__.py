"""Barriers h = log p₊/p₋, raw or on the sphere, and their fits."""
