"""Attention: the mask, the ways to compute it, and the choice between them."""
