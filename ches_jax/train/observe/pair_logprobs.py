"""Log-probabilities of many pairs under given weights: a forward pass over packed rows of one shape."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.data.packing import PackedBatch, Placement, plan_batches, write_batch
from ches_jax.distributed.mesh import put_rows, row_shards
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import Attend
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.decoder import Decoder
from ches_jax.models.logprobs import token_statistics
from ches_jax.train.data.batches import Layout, local_rows
from ches_jax.train.forward import prediction_logps, segment_logps
from ches_jax.types import TokenPair

BATCH_TOKENS = {"cpu": 4096}
MANY_BATCH_TOKENS = 32768
FEW = 8
"""So many pairs or fewer, such as the single pair of an experiment, are spared a full batch."""


class PairLogps(NamedTuple):
    """Summed log-probabilities in nats, float64, in the order of the pairs."""

    chosen: np.ndarray
    rejected: np.ndarray


class TokenLogps(NamedTuple):
    """Log-probabilities in nats of each token of every response, float64, in the order of the pairs."""

    chosen: list[np.ndarray]
    rejected: list[np.ndarray]

    def sums(self) -> PairLogps:
        """Of each response."""
        return PairLogps(*(np.array([v.sum() for v in side]) for side in self))


class PairStatistics(NamedTuple):
    """What an evaluation knows of every pair; float64, in the order of the pairs."""

    logps: PairLogps
    entropy: PairLogps
    """Mean over the tokens of a response of the entropy of the distribution each was drawn from, nats."""
    argmax_mass: PairLogps
    """Mean over the tokens of the largest probability of that distribution."""


@dataclass(frozen=True)
class _Architecture:
    """A decoder without arrays; equal to another of the same graph, which holds every setting of the computation."""

    graph: nnx.GraphDef
    decoder: Decoder = field(compare=False)


@lru_cache(maxsize=16)
def _programs(architecture: _Architecture, mesh: Mesh, attend: Attend) -> tuple[Any, Any]:
    """Statistics of segments and log-probabilities of tokens as functions of arrays alone.

    Runs of one architecture in one process share them, and what jax compiles of them.
    """
    on = mesh if mesh.size > 1 else None

    def pass_of(logps: Any) -> Any:
        def run(params: Any, rows: PackedBatch) -> Any:
            model = with_parameters(architecture.decoder, params)
            return logps(model, rows, attend=attend, mesh=on), rows.segment

        return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))

    return pass_of(partial(segment_logps, per_token=token_statistics)), pass_of(prediction_logps)


class Evaluator:
    """``evaluate(params, pairs)`` gives the log-probabilities of every pair; compiles once per row length."""

    def __init__(self, abstract: Decoder, mesh: Mesh, layout: Layout, attend: Attend = blocks):
        """Takes the decoder without arrays; parameters come with each call."""
        self.mesh = mesh
        self.layout = layout
        platform = jax.default_backend()
        self.rows = max(1, BATCH_TOKENS.get(platform, MANY_BATCH_TOKENS) // layout.row_tokens) * row_shards(mesh)
        self._sums, self._tokens = _programs(_Architecture(nnx.split(abstract)[0], abstract), mesh, attend)

    def __call__(self, params: Any, pairs: Sequence[TokenPair]) -> PairLogps:
        """Log-probabilities of ``pairs`` under ``params``."""
        return self.statistics(params, pairs).logps

    def under(self, params: Any, *, per_token: bool = False) -> Callable[[Sequence[TokenPair]], PairLogps | TokenLogps]:
        """The function of pairs alone: sums, or the log-probability of each token."""
        return partial(self.tokens if per_token else self.__call__, params)

    def statistics(self, params: Any, pairs: Sequence[TokenPair]) -> PairStatistics:
        """Log-probabilities of ``pairs``, and how sharp the distributions at their tokens are; NaN where none are."""
        totals = np.zeros((2, len(pairs), 3))
        for places, sums, _ in self._passes(self._sums, params, pairs):
            for p in places:
                for side, own in enumerate((p.chosen, p.rejected)):
                    totals[side, p.pair] = sums[p.row, p.shared] + sums[p.row, own]
        counts = np.array([[len(r.targets(self.layout.eos)) for r in (p.chosen, p.rejected)] for p in pairs], float)
        counts = counts.reshape(len(pairs), 2).T
        means = [np.divide(totals[..., k], counts, out=np.full_like(counts, np.nan), where=counts > 0) for k in (1, 2)]
        return PairStatistics(PairLogps(*totals[..., 0]), PairLogps(*means[0]), PairLogps(*means[1]))

    def tokens(self, params: Any, pairs: Sequence[TokenPair]) -> TokenLogps:
        """Log-probability of each response token of ``pairs`` under ``params``."""
        token_logps = TokenLogps([np.zeros(0)] * len(pairs), [np.zeros(0)] * len(pairs))
        for places, logps, segments in self._passes(self._tokens, params, pairs):
            for p in places:
                # a row's predictions stand in the order of its responses' tokens
                shared, *own = (
                    logps[p.row][segments[p.row] == segment] for segment in (p.shared, p.chosen, p.rejected)
                )
                token_logps.chosen[p.pair], token_logps.rejected[p.pair] = (
                    np.concatenate([shared, side]) for side in own
                )
        return token_logps

    def _passes(
        self, run: Any, params: Any, pairs: Sequence[TokenPair]
    ) -> Iterator[tuple[list[Placement], np.ndarray, np.ndarray]]:
        """The places of pairs, what the pass gives of all rows (float64), and the segments of their predictions."""
        layout = self.layout
        plans = plan_batches(
            pairs,
            length=layout.row_tokens,
            rows_per_batch=min(self.rows, FEW) if len(pairs) <= FEW else self.rows,
            row_multiple=row_shards(self.mesh),
            length_threshold=layout.length_threshold,
        )
        for plan in plans:
            local = local_rows(plan.row_count, layout)
            rows = write_batch(pairs, plan, layout.eos, layout.length_threshold, local)
            logps, segments = run(params, put_rows(rows, self.mesh))
            yield plan.placements(), np.asarray(logps, np.float64), np.asarray(segments)


class WatchedPairs:
    """The pairs of a run whose log-probabilities are followed; observers of one step share one forward pass."""

    def __init__(self, evaluate: Evaluator, sets: Mapping[str, Sequence[TokenPair]]):
        """``sets``: pairs by the name of their set, ``train`` or ``held_out``."""
        self.sets = sets
        self._evaluate = evaluate
        self._step = -1
        self._last: dict[str, PairStatistics] = {}

    def statistics(self, step: int, params: Any) -> dict[str, PairStatistics]:
        """Statistics of every set under the parameters after ``step`` updates; of one step computed once."""
        if step != self._step:
            self._last = {name: self._evaluate.statistics(params, pairs) for name, pairs in self.sets.items()}
            self._step = step
        return self._last
