"""What a user should know and that stops nothing: one line each, said once, through the logger ``ches_jax``."""

import logging
from functools import cache


@cache
def notice(text: str) -> None:
    """Tell ``text`` on standard error, or to whoever has set a handler on the logger; the same text once a process."""
    logging.getLogger("ches_jax").warning("ches: %s", text)
