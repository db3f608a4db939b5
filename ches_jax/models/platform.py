"""The kind of device that a program is compiled for: the one at hand, or the one it is planned for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_PLANNED: ContextVar[str | None] = ContextVar("planned platform", default=None)


def platform() -> str:
    """``cpu``, ``tpu`` or ``gpu``."""
    return _PLANNED.get() or jax.default_backend()


@contextmanager
def planned_for(name: str) -> Iterator[None]:
    """Within the block programs are built as for another kind of device.

    >>> with planned_for("tpu"):
    ...     platform()
    'tpu'
    """
    token = _PLANNED.set(name)
    try:
        yield
    finally:
        _PLANNED.reset(token)
