"""The ``ches`` command as a process: ``python -m ches_jax`` is ``ches``."""

import sys

from ches_jax.hugepages import with_large_pages


def run() -> int:
    """The command, in large pages."""
    with_large_pages()
    from ches_jax.cli import main  # after it: a process that starts again has loaded nothing

    return main()


if __name__ == "__main__":
    sys.exit(run())
