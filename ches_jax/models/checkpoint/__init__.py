"""Hugging Face weights to and from a decoder."""
