"""What a run cost, counted: the ``work`` of ``run.json``."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

_COMPILING = "/jax/core/compile/"
_PROGRAM = "/jax/core/compile/backend_compile_duration"
_FROM_CACHE = "/jax/compilation_cache/cache_hits"


class Work:
    """Counts from its making on, what this process did; a run that another process continued counts its own part.

    >>> work = Work()
    >>> with work.on_device():
    ...     _ = sum(range(10))
    >>> sorted(work.facts())
    ['cpu_seconds', 'programs', 'programs_from_cache', 'seconds']
    >>> sorted(work.facts()["seconds"])
    ['compiling', 'device', 'host']
    """

    def __init__(self) -> None:
        """Starts the clocks."""
        self._seen = _seen()
        self._before = Counter(self._seen)
        self._started = time.perf_counter(), time.process_time()
        self._device = 0.0

    def elapsed(self) -> float:
        """Wall seconds so far."""
        return time.perf_counter() - self._started[0]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """A block that starts programs or waits for what they compute; what it compiles is counted apart."""
        started, compiling = time.perf_counter(), self._seen["seconds"]
        try:
            yield
        finally:
            spent = time.perf_counter() - started - (self._seen["seconds"] - compiling)
            self._device += max(spent, 0.0)

    def facts(self, **more: Any) -> dict[str, Any]:
        """The counts so far.

        ``programs`` that jax asked its compiler for, ``programs_from_cache`` of them without compiling; wall seconds
        ``compiling`` (tracing and reading the cache included), in ``on_device`` blocks, and on the ``host`` (the rest);
        CPU seconds of all threads.

        Args:
          more: what else the verb counts.
        """
        done = Counter(self._seen)
        done.subtract(self._before)
        seconds = {"compiling": done["seconds"], "device": self._device}
        seconds["host"] = max(self.elapsed() - sum(seconds.values()), 0.0)
        return {
            "programs": int(done["programs"]),
            "programs_from_cache": int(done["from_cache"]),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "cpu_seconds": round(time.process_time() - self._started[1], 3),
            **more,
        }


@dataclass
class Positions:
    """Positions of arrays that went through a model, counted batch by batch; of several processes, those of all.

    >>> counted = Positions()
    >>> counted.add(computed=64, used=7, apart=10)
    >>> counted.facts()
    {'positions': 64, 'shared_positions': 3, 'padding': 0.8906}
    """

    computed: int = 0
    """All of them."""
    used: int = 0
    """Those that hold a token."""
    apart: int = 0
    """Those that would hold a token if each response were computed with a prompt of its own."""

    def add(self, *, computed: int = 0, used: int = 0, apart: int = 0) -> None:
        """Counts a batch."""
        self.computed += computed
        self.used += used
        self.apart += apart

    @property
    def padding(self) -> float:
        """Share of the computed positions that hold no token."""
        return 1 - self.used / self.computed if self.computed else 0.0

    def facts(self) -> dict[str, Any]:
        """For ``run.json``.

        ``positions`` that were computed, ``shared_positions`` that were not, since several responses begin with them,
        and the share of ``padding``.
        """
        return {
            "positions": self.computed,
            "shared_positions": self.apart - self.used,
            "padding": round(self.padding, 4),
        }


def total(works: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What processes cost that took turns at one run, or one process in several goes: counts and seconds add up.

    The share of padding is that of all positions; what each process holds is listed process by process.

    >>> one = {"programs": 2, "seconds": {"device": 1.5}, "positions": 100, "padding": 0.1, "weight_bytes": [7]}
    >>> total([one, {**one, "positions": 300, "padding": 0.3}])
    {'programs': 4, 'seconds': {'device': 3.0}, 'positions': 400, 'padding': 0.25, 'weight_bytes': [7, 7]}
    """
    all_of: dict[str, Any] = {}
    for name in dict.fromkeys(name for work in works for name in work):
        values = [work[name] for work in works if name in work]
        if name == "padding":
            positions = [work.get("positions", 0) for work in works if name in work]
            padded = sum(share * count for share, count in zip(values, positions, strict=True))
            all_of[name] = round(padded / max(sum(positions), 1), 4)
        elif isinstance(values[0], Mapping):
            all_of[name] = total(values)
        elif isinstance(values[0], list):
            all_of[name] = [one for value in values for one in value]
        else:
            all_of[name] = round(sum(values), 3)
    return all_of


@cache
def _seen() -> Counter[str]:
    """What jax has reported since the first call: its events cannot be read afterwards."""
    from jax import monitoring

    seen: Counter[str] = Counter()

    def lasted(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_COMPILING):
            seen["seconds"] += duration_secs  # type: ignore[assignment]
        seen["programs"] += event == _PROGRAM

    def happened(event: str, **_: Any) -> None:
        seen["from_cache"] += event == _FROM_CACHE

    monitoring.register_event_duration_secs_listener(lasted)
    monitoring.register_event_listener(happened)
    return seen
