"""From the number of an update to its micro-batches: a function of the data and that number alone."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ches_jax.data.packing import packed_length, tokens_apart
from ches_jax.losses import Loss
from ches_jax.runs.work import Positions
from ches_jax.train.data.batches import Batch, Layout, fitted, make_batch
from ches_jax.train.data.examples import Examples
from ches_jax.train.data.split import Plan
from ches_jax.train.reference import Logps

FITTED_UPDATES = 4096
"""Batch shapes are fitted to so many updates; a later one may still ask for a shape of its own."""


class Loader:
    """``loader(i)`` gives the micro-batches of update i (from 0)."""

    def __init__(self, loss: Loss, examples: Examples, plan: Plan, layout: Layout, reference: Logps | None, dtype: str):
        """Chooses the batch shapes of the run.

        Args:
          loss: the objective.
          examples: what is trained on.
          plan: which of them make which update.
          layout: how they are packed.
          reference: log-probabilities of ``examples`` under the reference, where the loss has one.
          dtype: of all that is no integer.
        """
        updates = range(min(plan.total, FITTED_UPDATES))
        groups = ([examples.item(j) for j in group] for i in updates for group in plan.update(i))
        self._layout = fitted(layout, groups)
        self._examples, self._plan, self._reference, self._dtype = examples, plan, reference, np.dtype(dtype)
        self.updates = plan.total
        self.sft: Loader | None = None
        """Of another set, whose rows come beside those of each update."""
        self._weighs_tokens = "pairs_per_token" in loss.optional and plan.accumulate > 1

    def __call__(self, update: int) -> list[Batch]:
        """The micro-batches of one update."""
        groups = self._plan.update(update)
        share = self._token_weight(groups) if self._weighs_tokens else {}
        batches = [self._micro_batch(group, share) for group in groups]
        if self.sft is None:
            return batches
        return [batch._replace(sft=sft) for batch, sft in zip(batches, self.sft(update), strict=True)]

    def ahead(self, first: int, total: int) -> Generator[list[Batch], None, None]:
        """Of updates ``first`` to ``total`` - 1; each is made while the one before it is computed."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self, first) if first < total else None
            for update in range(first, total):
                assert coming is not None
                batches = coming.result()
                coming = pool.submit(self, update + 1) if update + 1 < total else None
                yield batches

    def count(self, update: int, batches: list[Batch], counted: Positions) -> None:
        """Adds the positions of ``batches``, made by ``self(update)``, to ``counted``: the rows of all processes."""
        for group, batch in zip(self._plan.update(update), batches, strict=True):
            items = [self._examples.item(i) for i in group]
            shards = self._layout.row_multiple
            local = self._layout.local_shards
            counted.add(
                computed=batch.rows.tokens.size * shards // (shards if local is None else len(local)),
                used=sum(packed_length(item, self._layout.length_threshold) for item in items),
                apart=tokens_apart(items),
            )
        if self.sft is not None:
            self.sft.count(update, [batch.sft for batch in batches if batch.sft is not None], counted)

    def _token_weight(self, groups: list[np.ndarray]) -> dict[str, float]:
        """Pairs over tokens of the whole update: makes a mean over pairs one over tokens (``sft``)."""
        pairs, eos = self._examples.pairs, self._layout.eos
        tokens = sum(len(pairs[i].chosen.targets(eos)) for group in groups for i in group)
        return {"pairs_per_token": sum(map(len, groups)) / max(1, tokens)}

    def _micro_batch(self, group: np.ndarray, share: dict[str, float]) -> Batch:
        examples = self._examples
        extra: dict[str, Any] = {k: v[group] for k, v in examples.extra.items()}
        extra |= {k: np.full(len(group), v) for k, v in share.items()}
        ref = None if self._reference is None else examples.by_response(self._reference, group)
        return make_batch([examples.item(i) for i in group], self._layout, ref, extra, self._dtype)
