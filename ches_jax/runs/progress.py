"""What a long step is doing, in one line on standard error, before it begins."""

import sys

from ches_jax.errors import printable


def say(step: str, *, quiet: bool = False) -> None:
    """Print one step, unless ``quiet``: ``ches: loading the model (DIR)``."""
    if not quiet:
        print(f"ches: {printable(step)}", file=sys.stderr, flush=True)
