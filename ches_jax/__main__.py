"""The ``ches`` command as a process: ``python -m ches_jax`` is ``ches``."""

import contextlib
import gc
import os
import sys
import warnings

from ches_jax.hugepages import with_large_pages
from ches_jax.supervise import supervised

MORE_OBJECTS = 10_000
"""New objects between two searches of Python for garbage in cycles; its 700 are soon there while a pass is traced."""


def run() -> int:
    """The command, in large pages, without the warnings of other libraries (``python -W`` brings them back)."""
    with_large_pages()
    gc.set_threshold(MORE_OBJECTS)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    code = supervised(_main, sys.argv[1:])
    from ches_jax.cli import INTERRUPTED  # late, as in ``_main``, which has loaded it

    if code == INTERRUPTED:
        _leave(code)
    gc.freeze()  # nothing is searched as the process ends: half a second after jax
    return code


def _leave(code: int) -> None:
    """Ends at once: threads of C++ still compute or compile, and would abort as Python takes down what they use."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _main() -> int:
    from ches_jax.cli import main  # late: a process that starts again, or waits for another, has loaded nothing

    return main()


if __name__ == "__main__":
    sys.exit(run())
