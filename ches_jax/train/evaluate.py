"""Log-probabilities of many pairs under given weights: a forward pass over packed rows of one shape."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ches_jax.data.packing import Rows, pack
from ches_jax.models.decoder import Decoder
from ches_jax.models.load import with_parameters
from ches_jax.parallel import row_sharding, row_shards
from ches_jax.train.batches import Layout
from ches_jax.train.objective import segment_logps
from ches_jax.types import TokenPair

BLOCK = {"cpu": 64}
WIDE_BLOCK = 128
BATCH_TOKENS = {"cpu": 4096}
MANY_BATCH_TOKENS = 32768


class PairLogps(NamedTuple):
    """Summed log-probabilities in nats, float64, in the order of the pairs."""

    chosen: np.ndarray
    rejected: np.ndarray


class Evaluator:
    """``evaluate(params, pairs)`` gives the log-probabilities of every pair; compiles once per row length."""

    def __init__(self, abstract: Decoder, mesh: Mesh, layout: Layout):
        """Takes the decoder without arrays; parameters come with each call."""
        self.mesh = mesh
        self.layout = layout
        on = mesh if mesh.size > 1 else None
        platform = jax.default_backend()
        tile = BLOCK.get(platform, WIDE_BLOCK)
        self.rows = max(1, BATCH_TOKENS.get(platform, MANY_BATCH_TOKENS) // layout.row_tokens) * row_shards(mesh)

        @jax.jit
        def run(params: Any, rows: Rows) -> Any:
            length = rows.tokens.shape[1]
            block = tile if length % tile == 0 else length
            return segment_logps(with_parameters(abstract, params), rows, block=block, mesh=on)

        self._run = run

    def __call__(self, params: Any, pairs: Sequence[TokenPair]) -> PairLogps:
        """Log-probabilities of ``pairs`` under ``params``."""
        chosen, rejected = np.zeros(len(pairs)), np.zeros(len(pairs))
        batches = pack(
            pairs,
            length=self.layout.row_tokens,
            rows_per_batch=self.rows,
            row_multiple=row_shards(self.mesh),
            eos=self.layout.eos,
            length_threshold=self.layout.length_threshold,
        )
        for rows, places in batches:
            found = self._run(params, jax.device_put(rows, row_sharding(self.mesh)))
            sums = np.asarray(found, np.float64)
            for p in places:
                chosen[p.pair] = sums[p.row, p.shared] + sums[p.row, p.chosen]
                rejected[p.pair] = sums[p.row, p.shared] + sums[p.row, p.rejected]
        return PairLogps(chosen, rejected)
