"""The ``ches`` command as a process: ``python -m ches_jax`` is ``ches``."""

import sys
import warnings

from ches_jax.hugepages import with_large_pages
from ches_jax.supervise import supervised


def run() -> int:
    """The command, in large pages, without the warnings of other libraries (``python -W`` brings them back)."""
    with_large_pages()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    return supervised(_main, sys.argv[1:])


def _main() -> int:
    from ches_jax.cli import main  # late: a process that starts again, or waits for another, has loaded nothing

    return main()


if __name__ == "__main__":
    sys.exit(run())
