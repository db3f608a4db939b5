"""From the number of an update to its micro-batches: a function of run and number alone."""

from collections.abc import Callable

import numpy as np

from ches_jax.train.data.batches import Batch, fitted, make_batch
from ches_jax.train.reference import Logps
from ches_jax.train.setup import Run

FITTED_UPDATES = 4096
"""Batch shapes are fitted to so many updates; a later one may still ask for a shape of its own."""


def batch_maker(run: Run, reference: Logps | None, dtype: str) -> Callable[[int], list[Batch]]:
    """The function that makes the micro-batches of update 0, 1, 2, ..."""
    examples = run.train
    updates = range(min(run.plan.total, FITTED_UPDATES))
    layout = fitted(run.layout, ([examples.item(j) for j in group] for i in updates for group in run.plan.update(i)))

    def make(step: int) -> list[Batch]:
        groups = run.plan.update(step)
        share = {}
        if run.loss.name == "sft":
            tokens = sum(len(examples.pairs[i].chosen.targets(run.config.eos)) for g in groups for i in g)
            share["weights"] = sum(map(len, groups)) / max(1, tokens)
        made = []
        for group in groups:
            given = {k: v[group] for k, v in examples.given.items()}
            given |= {k: np.full(len(group), v) for k, v in share.items()}
            ref = None if reference is None else examples.by_response(reference, group)
            made.append(make_batch([examples.item(i) for i in group], layout, ref, given, np.dtype(dtype)))
        return made

    return make
