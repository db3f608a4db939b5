"""The tests. Their environment is set, and the checker of shapes at hand, before anything imports jax or the library."""

from tests import compiled, shapes  # noqa: F401, I001: in this order
