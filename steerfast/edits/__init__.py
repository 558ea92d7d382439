"""Interventions: small immutable objects, one row of the method table each."""
