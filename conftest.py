"""Read by pytest before the library is imported: the environment of the tests, and the checker of annotated shapes."""

from tests import shapes

shapes.install()
