"""The tests: their environment is set, and the checker of shapes at hand, before jax and the library are imported."""

from tests import compiled, shapes

__all__ = ["compiled", "shapes"]
