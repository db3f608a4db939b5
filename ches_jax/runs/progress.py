"""What a long step is doing, in one line on standard error, before it begins."""

import sys


def say(step: str, *, quiet: bool = False) -> None:
    """Print one step, unless ``quiet``: ``ches: loading the model (DIR)``."""
    if not quiet:
        print(f"ches: {step}", file=sys.stderr, flush=True)
