"""Read by pytest before the library is imported: the environment of the tests, and the checker of annotated shapes."""

import gc

from tests import shapes

# tracing makes many objects and few cycles: looked for after every 700, these cost a tenth of the tests
gc.set_threshold(50_000, 10, 10)
shapes.install()
