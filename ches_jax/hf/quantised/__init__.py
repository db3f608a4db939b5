"""Weights that are stored quantised, as the numbers that their format says they mean. No jax, no torch."""
