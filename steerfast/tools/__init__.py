"""Tools around steering: doses, sweeps, baked weights, proofs, conversions, pictures."""
