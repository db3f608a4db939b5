"""Attention: the mask, implementations, and the choice between them."""
