"""The jitted pass: packed rows in, segment statistics out, compiled once per row length.

On a data-only mesh each device takes its rows through the whole model, without a collective. With ``fsdp`` or
``tensor`` the weights are dealt out and the compiler places the collectives.
"""

import time
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.data.packing import Rows
from ches_jax.models.decoder import Decoder
from ches_jax.models.visibility import Visibility
from ches_jax.parallel import ROWS, row_sharding
from ches_jax.scores.statistics import SegmentStatistics, segment_statistics

BLOCK = {"cpu": 64}
WIDE_BLOCK = 128


def block_size(length: int) -> int:
    """Tile of block-skipping attention for rows of ``length``: what was fastest on the platform, if it divides."""
    block = BLOCK.get(jax.default_backend(), WIDE_BLOCK)
    return block if length % block == 0 else length


def _statistics(model: Decoder, rows: Rows, logps: bool, mesh: Mesh | None) -> SegmentStatistics:
    seen = Visibility(rows.context_start, rows.context_end, rows.own_start)
    block = block_size(rows.tokens.shape[1])
    hidden = model.hidden(rows.tokens, rows.positions, seen, rows.lengths, block=block, mesh=mesh)
    logits = model.logits if logps else None
    return segment_statistics(hidden, rows.source, rows.target, rows.segment, rows.last, logits)


class ScoringPass:
    """``pass_(rows)`` gives the statistics of a batch; compiles at the first batch of each row length.

    Attributes:
      compile_seconds: time spent compiling so far.
      shapes: the batch shapes compiled so far.
    """

    def __init__(self, model: Decoder, mesh: Mesh, *, logps: bool):
        """Takes a model that lies on ``mesh`` as ``partition.placement`` says (or anywhere, for a data-only mesh)."""
        self.mesh = mesh
        self.compile_seconds = 0.0
        self.shapes: list[tuple[int, ...]] = []
        self._compiled: dict[tuple[int, ...], Callable[..., SegmentStatistics]] = {}
        graph, state = nnx.split(model)
        whole = mesh.shape["fsdp"] == mesh.shape["tensor"] == 1
        self._state = jax.device_put(state, NamedSharding(mesh, PartitionSpec())) if whole else state

        def run(state, rows: Rows) -> SegmentStatistics:
            return _statistics(nnx.merge(graph, state), rows, logps, None if whole else mesh)

        if whole:
            # check_vma off: the loops of block-skipping attention carry per-device values from constant initial ones
            run = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), ROWS), out_specs=ROWS, check_vma=False)
        self._jitted = jax.jit(run)

    def __call__(self, rows: Rows) -> SegmentStatistics:
        """Statistics of the batch, still on their way from the device."""
        batch = jax.device_put(rows, row_sharding(self.mesh))
        shape = rows.tokens.shape
        if shape not in self._compiled:
            start = time.perf_counter()
            self._compiled[shape] = self._jitted.lower(self._state, batch).compile()
            self.compile_seconds += time.perf_counter() - start
            self.shapes.append(shape)
        return self._compiled[shape](self._state, batch)


def fetch(statistics: SegmentStatistics) -> SegmentStatistics:
    """The statistics as numpy arrays in float64, where all further arithmetic happens."""
    return SegmentStatistics(*(None if a is None else np.asarray(a, np.float64) for a in statistics))  # type: ignore[arg-type]
