"""``python -m ches_jax`` is ``ches``."""

import sys

from ches_jax.cli import main

sys.exit(main())
