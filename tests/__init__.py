"""The tests: their environment is set before jax is imported."""

from tests import compiled

__all__ = ["compiled"]
