"""What a claim is, and the list of them.

A claim's check returns a number that is compared with the claim's tolerance: a worst error (exact), a worst violation
(bound), a distance from the expected slope, or, for what is refuted as printed, how wrong the printed text is, which
then must be *above* the tolerance.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import jax
import numpy as np

from ches_jax.errors import ChesError, many
from theory.toy.instances import Draw, noise_for
from theory.toy.search import run_once

Status = Literal["exact", "bound", "statistical", "refuted as printed"]
Scope = Literal["toy", "model"]
EXACT = 1e-10
SLACK = 1e-12
"""Rounding of an inequality."""
QUICK = 100
"""Below this number of instances only the first size is compiled."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a check may use: randomness, size, and (for claims about a real model) the model with its pairs."""

    id: str = ""
    """The claim's."""
    seed: int = 0
    instances: int = 1000
    model: Any = None
    """A ``theory.models.real.RealModel``."""

    def key(self, name: str = "") -> tuple[int, ...]:
        """A seed of the claim's own, so that a claim's numbers do not depend on which others run."""
        return (self.seed, *(name or self.id).encode())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check saw."""

    value: float
    """Compared with the claim's tolerance."""
    n: int
    """Instances behind it."""
    detail: dict[str, Any] = field(default_factory=dict)
    figure: dict[str, Any] = field(default_factory=dict)
    """What the claim's figures are drawn from (``theory.figures``): arrays and words."""


Check = Callable[[Context], Outcome]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement with its check."""

    id: str
    statement: str
    source: str
    status: Status
    scope: Scope
    tolerance: float
    check: Check

    def holds(self, outcome: Outcome) -> bool:
        """Whether the outcome supports the claim; never for a number that is not finite."""
        if not np.isfinite(outcome.value):
            return False
        if self.status == "refuted as printed":
            return outcome.value >= self.tolerance
        return outcome.value <= self.tolerance


_CLAIMS: dict[str, Claim] = {}


def claim(
    id: str, statement: str, source: str, status: Status, tolerance: float, scope: Scope = "toy"
) -> Callable[[Check], Check]:
    """Enter a check in the registry."""

    def enter(check: Check) -> Check:
        if id in _CLAIMS:
            raise ValueError(f"two claims are named {id!r}")
        _CLAIMS[id] = Claim(
            id=id, statement=statement, source=source, status=status, scope=scope, tolerance=tolerance, check=check
        )
        return check

    return enter


def exact(id: str, statement: str, source: str, tolerance: float = EXACT, scope: Scope = "toy"):
    """A claim that two numbers are one; with tolerance 0, that something happens without exception."""
    return claim(id, statement, source, "exact", tolerance, scope)


def bound(id: str, statement: str, source: str, tolerance: float = SLACK, scope: Scope = "toy"):
    """A claim that something never happens; the value is the worst violation."""
    return claim(id, statement, source, "bound", tolerance, scope)


def statistical(id: str, statement: str, source: str, tolerance: float, scope: Scope = "toy"):
    """A claim about an average, a slope or a correlation."""
    return claim(id, statement, source, "statistical", tolerance, scope)


def refuted(id: str, statement: str, source: str, tolerance: float):
    """A statement that is wrong as printed, by the tolerance at least."""
    return claim(id, statement, source, "refuted as printed", tolerance)


def all_claims(scope: Scope | None = None) -> tuple[Claim, ...]:
    """Every claim, in the order in which they were written down."""
    return tuple(c for c in _CLAIMS.values() if scope is None or c.scope == scope)


def find(ids: Sequence[str]) -> tuple[Claim, ...]:
    """The claims of those ids, which may have commas between them and be written in any case.

    >>> [claim.id for claim in find(["t4,T5", "theorem 6"])]
    ['T4', 'T5', 'T6']

    Raises:
      ChesError: for ids that there are none of.
    """
    words = [
        re.sub(r"^(theorem|proposition) *", lambda m: m[0][0], w.strip(), flags=re.I) for i in ids for w in i.split(",")
    ]
    known = {claim.casefold(): claim for claim in _CLAIMS}
    problems = [f"no claim {w!r}; the claims are: {', '.join(_CLAIMS)}" for w in words if w.casefold() not in known]
    if problems:
        raise ChesError(many("--claims", problems))
    return tuple(_CLAIMS[known[w.casefold()]] for w in words)


def shared_sweeps(settings: Mapping[str, tuple[Callable[..., Any], Sequence[dict[str, int]]]]) -> Callable[..., Any]:
    """What sweeps saw that several claims read, by context and setting: each is made once for a seed and a count.

    Args:
      settings: name -> the check and the sizes, as for ``sweep``.
    """

    @lru_cache(maxsize=16)
    def seen(setting: str, seed: int, count: int) -> Any:
        check, sizes = settings[setting]
        return sweep(Context(seed=seed).key(setting), count, check, sizes)

    return lambda ctx, setting: seen(setting, ctx.seed, ctx.instances)


def sweep(
    key: tuple[int, ...], instances: int, check: Callable[..., Any], sizes: Sequence[dict[str, int]] = ({},)
) -> Any:
    """``check(draw, **size)`` on random instances, divided among the sizes; one compilation for each size.

    Every size gets ``QUICK`` instances at least: a quick look compiles only the first of them.

    Returns:
      The results as numpy arrays with the instances in front.
    """
    sizes = sizes[: max(1, instances // QUICK)]
    each = -(-instances // len(sizes))
    results = []
    for i, size in enumerate(sizes):

        def one(draw: Draw, size=size):
            return check(draw, **size)

        numbers = noise_for(one, (*key, i), each)
        results.append(jax.device_get(run_once(jax.vmap(lambda n, one=one: one(Draw(n))), numbers)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def worst(values: Any) -> float:
    """The largest value; infinite where one is not a number or there is none, so that it cannot pass."""
    return float(np.max(np.where(np.isnan(values), np.inf, values))) if np.size(values) else np.inf


def largest(errors: Any) -> Outcome:
    """The outcome of an exact claim: its largest error."""
    return Outcome(value=worst(errors), n=int(np.shape(errors)[0]), detail={"median": float(np.median(errors))})


def median(values: Any) -> Outcome:
    """The outcome of a refuted statement: how wrong it usually is."""
    values = np.asarray(values)
    return Outcome(value=float(np.median(values)), n=len(values), detail={"largest": float(values.max())})


def share(happened: Any) -> Outcome:
    """How often something happens."""
    return Outcome(value=float(np.mean(happened)), n=len(happened))


def exceptions(seen: dict[str, np.ndarray]) -> Outcome:
    """How often something happens that never should, over the instances that are ``clear`` (where that is a value)."""
    first = next(iter(seen.values()))
    clear = seen.get("clear", np.ones(len(first), bool))
    wrong = {name: int((values & clear).sum()) for name, values in seen.items() if name != "clear"}
    return Outcome(value=float(sum(wrong.values())), n=int(clear.sum()), detail=wrong)


def swept(
    *sizes: dict[str, int], times: int = 1, outcome_of: Callable[[Any], Outcome] = largest
) -> Callable[[Callable[..., Any]], Check]:
    """From what happens in one random instance, ``f(draw, **size)``, to the check of a claim.

    Args:
      sizes: of the instances.
      times: how many times the number of instances of the run.
      outcome_of: from the values of all instances to the outcome.
    """

    def check_of(one: Callable[..., Any]) -> Check:
        def check(ctx: Context) -> Outcome:
            return outcome_of(sweep(ctx.key(), times * ctx.instances, one, sizes or ({},)))

        return check

    return check_of
