r"""Optimisers by name, learning-rate schedules, clipping.

``rmsprop`` is torch's, which the displacement paper trains with: another start value, another decay or eps inside the
root gives another trajectory.

.. math:: v \leftarrow \alpha v + (1 - \alpha) g^2, \quad v_0 = 0, \qquad
          \theta \leftarrow \theta - \eta\, g / (\sqrt{v} + \epsilon)

The first step is :math:`\eta / \sqrt{1 - \alpha}` = 10 learning rates in the direction of the sign of the gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ches_jax.errors import ChesError, many
from ches_jax.train.config import ScheduleName

Params = dict[str, Array]
Schedule = Callable[[Any], Any]
"""From the number of an update (int32) to its learning rate (float32)."""
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


def require_schedule(name: str) -> None:
    """Refuse a schedule that is not known.

    Raises:
      ChesError: lists the names.
    """
    if name not in SCHEDULES:
        raise ChesError(f"--schedule {name!r}: expected one of {', '.join(SCHEDULES)}")


def make_schedule(name: str, peak: float, steps: int, warmup: int = 0) -> Schedule:
    """Learning rate of update 0, 1, 2, ...: a linear rise from 0 over ``warmup`` updates, then the named course.

    ``linear`` and ``cosine`` reach 0 at ``steps``, as transformers' schedules of these names do.
    """
    require_schedule(name)

    def schedule(count: Int[Array, ""]) -> Float[Array, ""]:
        at = count.astype(jnp.float32)
        rise = jnp.minimum(at / max(1, warmup), 1.0) if warmup else jnp.ones((), jnp.float32)
        done = jnp.clip((at - warmup) / max(1, steps - warmup), 0.0, 1.0)
        fall = {"constant": jnp.ones_like(done), "linear": 1 - done, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done))}
        return peak * rise * fall[name]

    return schedule


class RmspropState(NamedTuple):
    """Running mean of squared gradients."""

    square: Any


def _scale_by_torch_rmsprop(alpha: float, eps: float) -> optax.GradientTransformation:
    def init(params: Any) -> RmspropState:
        return RmspropState(jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: RmspropState, params: Any = None) -> tuple[Any, RmspropState]:
        square = jax.tree.map(lambda v, g: alpha * v + (1 - alpha) * g * g, state.square, grads)
        return jax.tree.map(lambda g, v: g / (jnp.sqrt(v) + eps), grads, square), RmspropState(square)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


VECTORS = ("bias", "sinks", "scale", "correction", "scalar")
"""Ends of the names of parameters that are no matrices, norms aside; the last two are stored and not trained."""


def decays(params: Params) -> dict[str, bool]:
    """Where weight decay applies: matrices, not norm weights, biases and the other vectors."""
    return {name: "norm" not in name and not name.endswith(VECTORS) for name in params}


def _rmsprop(schedule: Schedule, *, alpha: float, eps: float, momentum: float) -> optax.GradientTransformation:
    trace = [optax.trace(momentum)] if momentum else []
    return optax.chain(_scale_by_torch_rmsprop(alpha, eps), *trace, optax.scale_by_learning_rate(schedule))


def _adamw(schedule: Schedule, *, b1: float, b2: float, eps: float, weight_decay: float):
    return optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=decays)


def _adafactor(schedule: Schedule, *, decay_rate: float, clip: float, weight_decay: float):
    return optax.adafactor(
        schedule,
        decay_rate=decay_rate,
        clipping_threshold=clip,
        weight_decay_rate=weight_decay or None,
        weight_decay_mask=decays,
    )


def _sgd(schedule: Schedule, *, momentum: float) -> optax.GradientTransformation:
    trace = [optax.trace(momentum)] if momentum else []
    return optax.chain(*trace, optax.scale_by_learning_rate(schedule))


@dataclass(frozen=True)
class _Entry:
    make: Callable[..., optax.GradientTransformation]
    hyper: Mapping[str, float]


OPTIMIZERS: Mapping[str, _Entry] = {
    "rmsprop": _Entry(_rmsprop, {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0}),
    "adamw": _Entry(_adamw, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}),
    "adafactor": _Entry(_adafactor, {"decay_rate": 0.8, "clip": 1.0, "weight_decay": 0.0}),
    "sgd": _Entry(_sgd, {"momentum": 0.0}),
}


def optimizer_hyper(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """The optimiser's hyper-parameters with every value filled in.

    Raises:
      ChesError: unknown optimiser or hyper-parameter.
    """
    if name not in OPTIMIZERS:
        raise ChesError(f"no optimiser is named {name!r}; the names are: {', '.join(OPTIMIZERS)}")
    known = OPTIMIZERS[name].hyper
    unknown = [f"no hyper-parameter {k!r}; it has: {', '.join(known)}" for k in values if k not in known]
    if unknown:
        raise ChesError(many(f"optimiser {name!r}", unknown))
    return {**known, **values}


def make_optimizer(name: str, schedule: Schedule, **hyper: float) -> optax.GradientTransformation:
    """The optimiser of that name; its state and updates have the dtype of the parameters.

    Raises:
      ChesError: unknown optimiser (the names are listed) or hyper-parameter.
    """
    values = optimizer_hyper(name, hyper)
    inner = OPTIMIZERS[name].make(schedule, **values)

    # optax mixes dtypes and ranks, which a caller may have forbidden
    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return inner.init(params)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return inner.update(grads, state, params)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def clipped(grads: Params, norm: Float[Array, ""], most: float) -> Params:
    """Gradients scaled so that their global norm is at most ``most``, as torch's ``clip_grad_norm_`` does."""
    factor = jnp.minimum(1.0, most / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
