"""What a claim is, and the list of them.

A claim's check returns a number that is compared with the claim's tolerance: a worst error (exact), a worst violation
(bound), a distance from the expected slope, or, for what is refuted as printed, how wrong the printed text is, which
then must be *above* the tolerance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from ches_jax.errors import ChesError, many
from theory.instances import Draw, Noise, noise

Status = Literal["exact", "bound", "statistical", "refuted as printed"]
Scope = Literal["toy", "model"]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a check may use: randomness, size, and (for claims about a real model) the model with its pairs."""

    seed: int = 0
    instances: int = 1000
    model: Any = None
    """A ``theory.real.RealModel``."""

    def key(self, name: str) -> tuple[int, ...]:
        """A seed of the claim's own, so that a claim's numbers do not depend on which others run."""
        return (self.seed, *name.encode())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check saw."""

    value: float
    """Compared with the claim's tolerance."""
    n: int
    """Instances behind it."""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement with its check."""

    id: str
    statement: str
    source: str
    status: Status
    scope: Scope
    tolerance: float
    check: Callable[[Context], Outcome]

    def holds(self, outcome: Outcome) -> bool:
        """Whether the outcome supports the claim; never for a number that is not finite."""
        if not np.isfinite(outcome.value):
            return False
        if self.status == "refuted as printed":
            return outcome.value >= self.tolerance
        return outcome.value <= self.tolerance


_CLAIMS: dict[str, Claim] = {}


def claim(
    id: str, statement: str, *, source: str, status: Status, tolerance: float, scope: Scope = "toy"
) -> Callable[[Callable[[Context], Outcome]], Callable[[Context], Outcome]]:
    """Enter a check in the registry."""

    def enter(check: Callable[[Context], Outcome]) -> Callable[[Context], Outcome]:
        if id in _CLAIMS:
            raise ValueError(f"two claims are named {id!r}")
        _CLAIMS[id] = Claim(
            id=id, statement=statement, source=source, status=status, scope=scope, tolerance=tolerance, check=check
        )
        return check

    return enter


def all_claims(scope: Scope | None = None) -> tuple[Claim, ...]:
    """Every claim, in the order in which they were written down."""
    return tuple(c for c in _CLAIMS.values() if scope is None or c.scope == scope)


def find(ids: Sequence[str]) -> tuple[Claim, ...]:
    """The claims of those ids.

    Raises:
      ChesError: for ids that there are none of.
    """
    problems = [f"no claim {i!r}; the claims are: {', '.join(_CLAIMS)}" for i in ids if i not in _CLAIMS]
    if problems:
        raise ChesError(many("--claims", problems))
    return tuple(_CLAIMS[i] for i in ids)


def sweep(key: tuple[int, ...], instances: int, check: Callable[..., Any], sizes: Sequence[dict[str, int]]) -> Any:
    """``check(draw, **size)`` on so many instances, dealt out over the sizes; one compilation for each size.

    Every size gets a hundred instances at least: a quick look compiles only the first of them.

    Returns:
      The results as numpy arrays with the instances in front.
    """
    sizes = sizes[: max(1, instances // 100)]
    each = -(-instances // len(sizes))
    found = []
    for i, size in enumerate(sizes):

        def one(numbers: Noise, size=size):
            return check(Draw(numbers), **size)

        found.append(jax.device_get(jax.jit(jax.vmap(one))(noise((*key, i), each))))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def worst(values: Any) -> float:
    """The largest value; infinite where one is not a number, so that it cannot pass."""
    return float(np.max(np.where(np.isnan(values), np.inf, values)))


def error_outcome(errors: Any) -> Outcome:
    """The outcome of an exact claim."""
    return Outcome(value=worst(errors), n=int(np.shape(errors)[0]), detail={"median": float(np.median(errors))})
