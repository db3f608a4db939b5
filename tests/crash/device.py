"""Runs without a device: the passes of the model give numbers that follow from their inputs alone.

What is killed are operations on files. A pass of the model makes none, and compiling it for every kill costs hours.
"""

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from ches_jax.runs.work import Positions


def _number(*words: Any) -> float:
    """A number that follows from words, between -1 and 1."""
    return float(np.random.default_rng(list("/".join(map(str, words)).encode())).uniform(-1, 1))


class Scorer:
    """Stands for ``scores.scorer.PairScorer``."""

    waste = 0.0
    gradients = None
    run = SimpleNamespace(compile_seconds=0.0, shapes=[])
    batching = SimpleNamespace(batch_tokens=1)
    on_batch: Callable[[int], None]

    def facts(self) -> dict[str, Any]:
        """Nothing was done."""
        return {}

    def __call__(self, pairs: Sequence[Any]) -> tuple[dict[str, Any], dict[str, list]]:
        columns: dict[str, Any] = {
            "row_id": [p.row_id for p in pairs],
            "index": [p.index for p in pairs],
            "category": [p.category for p in pairs],
            "flags": [list(p.flags) for p in pairs],
            "chosen_tokens": [len(p.chosen.content) for p in pairs],
            "rejected_tokens": [len(p.rejected.content) for p in pairs],
        }
        for name in ("ches", "ln_ches", "edit_distance", "logp_chosen", "logp_rejected"):
            columns[name] = [_number(name, p.row_id) for p in pairs]
        tokens = [(p, t) for p in pairs for t in p.chosen.content]
        return columns, {
            "row_id": [p.row_id for p, _ in tokens],
            "index": [p.index for p, _ in tokens],
            "response": ["chosen"] * len(tokens),
            "position": [0] * len(tokens),
            "token": [t for _, t in tokens],
            "ches": [_number(p.row_id, t) for p, t in tokens],
            "head_score": [None] * len(tokens),
            "nthr": [None] * len(tokens),
            "logp": [_number("logp", p.row_id, t) for p, t in tokens],
        }


class Engine:
    """Stands for ``generate.engine.Engine``."""

    shapes: Sequence[tuple[int, int]] = ()
    counted = Positions()

    def __init__(self, *args: Any, **options: Any):
        pass

    def __call__(self, requests: Sequence[Any], rows: int, progress: Callable[[int], Any]) -> list[Any]:
        from ches_jax.generate.engine import Completion

        tokens = [tuple(5 + int(50 * abs(_number(r.prompt, i))) for i in range(3)) for r in requests]
        return [Completion(t, np.array([-1.0, -2.0, _number(t)]), False) for t in tokens]


def _statistics(self: Any, params: Any, pairs: Sequence[Any]) -> Any:
    from ches_jax.train.observe.pair_logprobs import PairLogps, PairStatistics

    weight = float(np.asarray(next(iter(params.values())), np.float32).ravel()[0])
    sides = [np.array([_number(p.row_id, side) + weight for p in pairs]) for side in ("chosen", "rejected")]
    return PairStatistics(*[PairLogps(*sides)] * 3)


def _update(self: Any, state: Any, batches: Sequence[Any]) -> tuple[Any, dict[str, float]]:
    import jax

    moved = jax.tree.map(
        lambda p: jax.device_put(np.asarray(p) * np.asarray(p).dtype.type(0.5), p.sharding), state.params
    )
    step = jax.device_put(np.asarray(state.step) + np.asarray(1, np.asarray(state.step).dtype), state.step.sharding)
    return state._replace(params=moved, step=step), {"loss": 0.5, "grad_norm": 1.0}


@contextlib.contextmanager
def without_device():
    """The passes of score, generate and train replaced; everything else is as it is."""
    loaded = SimpleNamespace(config=SimpleNamespace(family="llama"))
    with contextlib.ExitStack() as stack:
        for name, fake in (
            ("ches_jax.scores.run.pair_scorer", lambda *args, **options: Scorer()),
            ("ches_jax.models.checkpoint.load.load_model", lambda *args, **options: loaded),
            ("ches_jax.generate.run.Engine", Engine),
            ("ches_jax.train.observe.pair_logprobs.Evaluator.statistics", _statistics),
            ("ches_jax.train.step.Step.__call__", _update),
            ("ches_jax.train.observe.eval_loss.EvalLoss.observe", lambda *args: {"eval_loss": 0.5}),
            ("ches_jax.train.loop.require_agreement", lambda *args: None),
        ):
            stack.enter_context(mock.patch(name, fake))
        yield
