"""The ``ches`` command as a process: ``python -m ches_jax`` is ``ches``."""

import sys
import warnings

from ches_jax.hugepages import with_large_pages


def run() -> int:
    """The command, in large pages, without the warnings of other libraries (``python -W`` brings them back)."""
    with_large_pages()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from ches_jax.cli import main  # after it: a process that starts again has loaded nothing

    return main()


if __name__ == "__main__":
    sys.exit(run())
