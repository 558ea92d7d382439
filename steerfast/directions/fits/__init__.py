"""Estimators of interventions from two sides of activations, one small function each; `sf.fit` calls them by name."""
