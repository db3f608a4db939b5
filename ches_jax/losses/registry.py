"""The closed list of objectives: a name, its hyper-parameters, what it needs, where it comes from.

An unknown name, an unknown or ill-valued hyper-parameter and a missing input are errors: no objective is silently
replaced by another one. ``repr`` of a :class:`Loss` is what will be trained, every value filled in.

>>> get_loss("sigmoid", beta=0.3)
sigmoid(beta=0.3)
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from ches_jax.errors import ChesError, many
from ches_jax.losses.inputs import REFERENCE, Aux, LossInputs, RunningMean, in_single_precision, shape_problems
from ches_jax.losses.metrics import Rewards, log_ratio_rewards, pair_metrics


@dataclass(frozen=True, slots=True)
class Hyper:
    """A hyper-parameter: its default, and the interval it may lie in."""

    default: float
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def admits(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def interval(self) -> str:
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.open_high or self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


def positive(default: float) -> Hyper:
    return Hyper(default, low=0.0, open_low=True)


def at_least_zero(default: float) -> Hyper:
    return Hyper(default, low=0.0)


def any_number(default: float) -> Hyper:
    return Hyper(default)


def fraction(default: float) -> Hyper:
    return Hyper(default, low=0.0, high=1.0)


def exactly(value: float) -> str:
    """The shortest text that reads back as the value.

    >>> exactly(1.0), exactly(0.1)
    ('1', '0.1')
    """
    return str(int(value)) if value == int(value) else repr(float(value))


def as_number(value: object) -> float | None:
    """A number of Python, numpy or jax as Python's; None for what is none: a text, a truth value, a traced array.

    >>> as_number(np.float32(0.5)), as_number(jnp.array(2)), as_number(True), as_number("0.1")
    (0.5, 2.0, None, None)
    """
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, Tracer) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Loss:
    """An objective with every choice made: call it with a batch.

    Returns the loss of each pair (never their mean) and what to log. Pure: state goes in with the batch and comes out
    in ``aux``.
    """

    name: str
    needs: frozenset[str]
    """Fields of ``LossInputs`` that must be there."""
    compute: Callable[[LossInputs], tuple[Array, Aux]] = field(repr=False)
    hyper: Mapping[str, float] = field(default_factory=dict, hash=False)
    source: str = ""
    initial: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    """Its state before the first batch, by field of ``LossInputs``; the next one comes back under ``aux["state/..."]``.
    Empty for most."""
    couples_rows: bool = False
    """Whether it compares pairs of a batch with one another, so that its rows are not pairs."""
    optional: frozenset[str] = frozenset()
    """Fields that it reads where they are there."""

    @property
    def stateful(self) -> bool:
        """Whether it reads a state and returns the next one."""
        return bool(self.initial)

    @property
    def needs_whole_batches(self) -> bool:
        """Whether a batch that is cut into parts has another gradient than the whole.

        Its pairs are compared with one another, or with a mean that moves with every batch.
        """
        return self.couples_rows or self.stateful

    def __repr__(self) -> str:
        numbers = ", ".join(f"{k}={exactly(v)}" for k, v in self.hyper.items())
        return f"{self.name}({numbers})" if numbers else self.name

    def __call__(self, batch: LossInputs, *more: Any) -> tuple[Array, Aux]:
        """The loss of each pair, and what to log.

        Raises:
          ChesError: inputs that are missing, or that are no ``LossInputs``.
        """
        return self.compute(check_inputs(self, None if more else batch))


@dataclass(frozen=True, slots=True)
class Entry:
    """An objective before its hyper-parameters are chosen."""

    name: str
    needs: frozenset[str]
    fn: Callable[..., Array]
    hyper: Mapping[str, Hyper]
    source: str
    rewards: Rewards
    next_state: Callable[..., dict[str, RunningMean]] | None = None
    couples_rows: bool = False
    optional: frozenset[str] = frozenset()

    def resolve(self, values: Mapping[str, float]) -> Loss:
        def compute(batch: LossInputs) -> tuple[Array, Aux]:
            aux: Aux = {**pair_metrics(batch, self.rewards, values)}
            if self.next_state is not None:
                aux |= self.next_state(batch, **values)
            return self.fn(batch, **values), aux

        return Loss(
            name=self.name,
            needs=self.needs,
            compute=compute,
            hyper=MappingProxyType(dict(values)),
            source=self.source,
            initial={} if self.next_state is None else {"reward_mean": RunningMean(0.0, 0.0)},
            couples_rows=self.couples_rows,
            optional=self.optional,
        )


_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    *,
    source: str,
    needs: frozenset[str] = REFERENCE,
    rewards: Rewards = log_ratio_rewards,
    next_state: Callable[..., dict[str, RunningMean]] | None = None,
    couples_rows: bool = False,
    optional: frozenset[str] = frozenset(),
    **hyper: Hyper,
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Enter a function of (batch, hyper-parameters) in the list, under a name of its own."""

    def enter(fn: Callable[..., Array]) -> Callable[..., Array]:
        if name in _ENTRIES:
            raise ValueError(f"two losses are named {name!r}")
        _ENTRIES[name] = Entry(name, needs, fn, hyper, source, rewards, next_state, couples_rows, optional)
        return fn

    return enter


def loss_names() -> tuple[str, ...]:
    """Every name ``get_loss`` knows, sorted."""
    return tuple(sorted(_ENTRIES))


def distinct_losses() -> dict[str, tuple[str, ...]]:
    """Every equation once: its first name, and all names it has (they may differ in their defaults).

    >>> distinct_losses()["dpo"]
    ('dpo', 'sigmoid', 'gpo_logistic')
    """
    by_equation: dict[Any, list[str]] = {}
    for name, entry in _ENTRIES.items():
        by_equation.setdefault(entry.fn, []).append(name)
    return {names[0]: tuple(names) for names in by_equation.values()}


def hyper_names(name: str) -> tuple[str, ...]:
    """Names of the hyper-parameters of an objective."""
    return tuple(_entry(name).hyper)


def describe(name: str) -> str:
    """Equation, source, defaults and units of an objective: its docstring."""
    return _entry(name).fn.__doc__ or ""


def get_loss(name: str, **hyper: float) -> Loss:
    """The objective of that name, with the given hyper-parameters and defaults for the others.

    Args:
      name: one of ``loss_names()``.
      hyper: values for the hyper-parameters that the objective declares.

    Raises:
      ChesError: for an unknown name, an unknown hyper-parameter or a value out of its range, all in one message.

    >>> get_loss("dpo", beta=0.05)
    dpo(beta=0.05)
    """
    entry = _entry(name)
    problems: list[str] = []
    numbers: dict[str, float] = {}
    for key, value in hyper.items():
        if key not in entry.hyper:
            known = ", ".join(f"{k} (default {h.default:g})" for k, h in entry.hyper.items()) or "none"
            problems.append(f"no hyper-parameter {key!r}; it has: {known}")
        elif (number := as_number(value)) is None:
            problems.append(f"{key}={value!r} is not a number")
        elif not entry.hyper[key].admits(number):
            problems.append(f"{key}={value!r} is outside {entry.hyper[key].interval()}")
        else:
            numbers[key] = number
    if problems:
        raise ChesError(many(f"loss {name!r}", problems))
    return entry.resolve({k: numbers.get(k, float(h.default)) for k, h in entry.hyper.items()})


def _entry(name: str) -> Entry:
    if not isinstance(name, str):
        raise ChesError(
            f"a loss is given by its name, such as 'dpo', not {name!r:.80}; several of TRL's loss_type with their "
            "weights: ches_jax.losses.from_trl([...], [...])"
        )
    if name not in _ENTRIES and not name.isidentifier():
        raise ChesError(
            f"no loss is named {name!r:.80}; an expression is read by ches_jax.losses.parse_loss, a loss with its "
            "numbers is get_loss('dpo', beta=0.1)"
        )
    if name not in _ENTRIES:
        raise ChesError(unknown_name(name, loss_names()))
    return _ENTRIES[name]


def unknown_name(name: str, names: Sequence[str], what: str = "loss") -> str:
    """The message for a name that is none of ``names``: the nearest ones, then all.

    >>> unknown_name("ipo", ["dpo", "ipo_mean", "ipo_sum", "kto"])
    "no loss is named 'ipo'; the nearest are ipo_mean, ipo_sum; the names are: dpo, ipo_mean, ipo_sum, kto"
    """
    small = name.lower()
    near = [n for n in names if small in (n, n.rpartition("_")[0])] or difflib.get_close_matches(small, names)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    return f"no {what} is named {name!r}{hint}; the names are: {', '.join(names)}"


def check_inputs(loss: Loss, batch: Any) -> LossInputs:
    """The batch in single precision or better.

    Raises:
      ChesError: one clear error for what is no batch, for what is missing or no array, for shapes that would broadcast,
        and for weights that nobody would read.
    """
    if not isinstance(batch, LossInputs):
        fields = ", ".join(f"{name}=..." for name in sorted(loss.needs))
        raise ChesError(f"loss {loss.name!r}: expected one ches_jax.LossInputs({fields})")
    missing = sorted(n for n in loss.needs if getattr(batch, n) is None)
    problems = [f"needs {n}, which the batch does not have" for n in missing]
    if batch.weights is not None and "weights" not in loss.needs:
        problems.append("the batch has weights, which this loss does not read; wrap it: weighted(...)")
    read = (loss.needs | loss.optional) - {*missing}
    batch, unread = in_single_precision(batch, read)
    problems += unread or shape_problems(batch, loss.needs - {*missing})
    if problems:
        raise ChesError(many(f"loss {loss.name!r}", problems))
    return batch


def mean_loss(loss: Loss, batch: LossInputs) -> tuple[Array, dict[str, Any]]:
    """Mean over the batch of the loss, and of every metric; states pass through."""
    value, aux = loss(batch)
    logs = {k: v if k.startswith("state/") else jax.tree.map(jnp.mean, v) for k, v in aux.items()}
    return jnp.mean(value), logs
