"""The jitted forward pass: a packed batch in, segment statistics out, compiled once per row length.

On a data-only mesh each device takes its rows through the whole model, without a collective. With ``fsdp`` or
``tensor`` the weights are sharded and the compiler places the collectives. The statistics lie as the rows do, whatever
the number of processes: each reads those of its own rows (``fetch``), and only what is made of them travels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.data.packing import PackedBatch, empty_batch, standard_max_pairs
from ches_jax.distributed.mesh import (
    ROW_AXES,
    ROWS,
    bytes_here,
    put_own_rows,
    row_sharding,
    row_shards,
    rows_here,
    spans_processes,
    weights_are_whole,
)
from ches_jax.errors import ChesError
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import Attend, dense
from ches_jax.models.attention.mask import KeyRanges, Visibility
from ches_jax.models.cache import Cache
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder
from ches_jax.models.logprobs import Head, token_logps
from ches_jax.scores.hidden_sums import SegmentStatistics, segment_statistics
from ches_jax.scores.unembedding_gradients import ches_products, head_products

LOGIT_TOKENS = 256
"""Positions of a device's rows whose logits are computed at a time."""


@dataclass(frozen=True)
class Outputs:
    """What is computed besides the sums of hidden states."""

    logps: bool = False
    head_score: bool = False
    token_scores: bool = False


def _statistics(
    model: Decoder, before: Cache | None, rows: PackedBatch, outputs: Outputs, mesh: Mesh | None, attend: Attend
) -> SegmentStatistics:
    seen = Visibility(rows.context_start, rows.context_end, rows.own_start)
    if before is None:
        hidden = model.hidden(rows.tokens, rows.positions, seen, rows.lengths, attend=attend, mesh=mesh)
    else:
        ranges = KeyRanges(*seen, rows.own_end)
        hidden = model.hidden_behind(
            before, rows.tokens, rows.positions, ranges, rows.keys, rows.lengths, attend=attend
        )
    logps = _token_logps_of(model, mesh) if outputs.logps else None
    statistics = segment_statistics(hidden, rows.source, rows.target, rows.segment, rows.last, logps)
    predicting = jnp.take_along_axis(hidden, rows.source[..., None], axis=1)
    if not outputs.token_scores:
        statistics = statistics._replace(token_logps=None)
    else:
        statistics = statistics._replace(ches_products=ches_products(predicting, rows.segment, rows.last.shape[1]))
    if outputs.head_score:
        head = head_products(
            predicting, rows.target, rows.segment, rows.item, rows.preferred, model.unembedding, model.logit_transform,
            logical=model.auto_mesh(mesh),
        )  # fmt: skip
        statistics = statistics._replace(head_products=head)
    return statistics


def _token_logps_of(model: Decoder, mesh: Mesh | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Log-probabilities of targets from ``Decoder.logits``, a chunk at a time."""

    def compute(hidden: jax.Array, target: jax.Array) -> jax.Array:
        config, rows, logical = model.config, hidden.shape[0], model.auto_mesh(mesh)
        if logical is not None and logical.rows(rows) == ROWS:
            rows //= logical.size(*ROW_AXES)
        head = Head(config.logit_scale, config.logit_softcap, max(1, LOGIT_TOKENS // rows), True, logical)
        return token_logps(hidden, model.unembedding, target, head)

    return compute


@lru_cache(maxsize=16)
def pass_program(graph: nnx.GraphDef, mesh: Mesh, outputs: Outputs, attend: Attend) -> Any:
    """The pass as a function of arrays alone: models of one architecture share it, and what jax compiles of it."""
    whole = weights_are_whole(mesh)

    def run(state, before: Cache | None, rows: PackedBatch) -> SegmentStatistics:
        return _statistics(nnx.merge(graph, state), before, rows, outputs, None if whole else mesh, attend)

    if whole:
        # check_vma off: the loops of block-skipping attention carry per-device values from constant initial ones
        specs = (PartitionSpec(), PartitionSpec(), ROWS)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False)
    return jax.jit(run, out_shardings=row_sharding(mesh))


@lru_cache(maxsize=16)
def prefix_program(graph: nnx.GraphDef, mesh: Mesh, attend: Attend) -> Any:
    """What the layers keep of a text, on every device, as a function of the weights and its tokens, [1, P]."""

    def run(state, tokens: jax.Array) -> Cache:
        model: Decoder = nnx.merge(graph, state)
        return model.prefill(tokens, jnp.zeros(1, jnp.int32), tokens.shape[1], attend=attend)[1]

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


class ForwardPass:
    """``pass_(rows)`` gives the statistics of a batch; compiles at the first batch of each shape.

    Attributes:
      compile_seconds: time spent compiling so far.
      shapes: the batch shapes compiled so far.
      shares_prefix: whether rows may be behind a prefix here (``data.prefix``).
    """

    def __init__(self, model: Decoder, mesh: Mesh, outputs: Outputs = Outputs(), attend: Attend = blocks):
        """Takes a model that lies on ``mesh`` as ``sharding.placement`` says (or anywhere, for a data-only mesh)."""
        self.mesh = mesh
        self.outputs = outputs
        self.compile_seconds = 0.0
        self.shapes: list[tuple[int, ...]] = []
        self._compiled: dict[tuple[int, ...], Callable[..., SegmentStatistics]] = {}
        graph, state = nnx.split(model)
        whole = weights_are_whole(mesh)
        self._state = jax.device_put(state, NamedSharding(mesh, PartitionSpec())) if whole else state

        self._jitted = pass_program(graph, mesh, outputs, attend)
        self._prefix = prefix_program(graph, mesh, attend)
        own = whole and not spans_processes(mesh) and model.mesh is None
        self.shares_prefix = own and _may_share_prefix(model.config, attend)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on this process's devices."""
        return bytes_here(self._state)

    def compile(self, rows: int, length: int, max_pairs: int | None = None) -> Callable[..., SegmentStatistics]:
        """The program for batches of ``rows`` x ``length`` with at most ``max_pairs`` a row, compiled once.

        Raises:
          ChesError: the device has not enough memory; says what helps.
        """
        shape = (rows, length) if max_pairs in (None, standard_max_pairs(length)) else (rows, length, max_pairs)
        return self._program(shape, None, empty_batch(rows, length, max_pairs))

    def _program(
        self, shape: tuple[int, ...], before: Cache | None, rows: PackedBatch
    ) -> Callable[..., SegmentStatistics]:
        """The program for arrays like these, which ``shape`` tells apart from all others."""
        if shape not in self._compiled:
            start = time.perf_counter()
            like = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=row_sharding(self.mesh)), rows
            )
            try:
                self._compiled[shape] = self._jitted.lower(self._state, before, like).compile()
            except jax.errors.JaxRuntimeError as e:
                raise _memory_error(e, shape) from e
            self.compile_seconds += time.perf_counter() - start
            self.shapes.append(shape)
        return self._compiled[shape]

    def memory(self, rows: int, length: int) -> int:
        """Bytes a device needs for a batch besides the weights, as the compiler counts them (0: unknown)."""
        analysis = self.compile(rows, length).memory_analysis()  # type: ignore[attr-defined]
        return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes) if analysis else 0

    def prefix(self, tokens: Sequence[int]) -> Cache:
        """What the layers keep of a text that rows are behind; compiles at the first one of each length."""
        return self._prefix(self._state, np.array([tokens], np.int32))

    def __call__(self, rows: PackedBatch, before: Cache | None = None) -> SegmentStatistics:
        """Statistics of the batch, not yet transferred from the device; ``before`` is what its ``keys`` begin with."""
        return self.prepared(rows, before)()

    def prepared(self, rows: PackedBatch, before: Cache | None = None) -> Callable[[], SegmentStatistics]:
        """What computes the statistics of a batch that lies on the devices, compiled; for any thread."""
        pairs = rows.last.shape[1] // 3
        if before is None:
            program = self.compile(*rows.tokens.shape, max_pairs=pairs)
        else:
            assert rows.keys is not None
            sizes = (jax.tree.leaves(before)[0].shape[-2], rows.keys.shape[1])
            program = self._program((*rows.tokens.shape, pairs, *sizes), before, rows)
        put = put_own_rows(rows, self.mesh)

        def compute() -> SegmentStatistics:
            try:
                return program(self._state, before, put)
            except jax.errors.JaxRuntimeError as e:
                raise _memory_error(e, rows.tokens.shape) from e

        return compute


def _may_share_prefix(config: DecoderConfig, attend: Attend) -> bool:
    """Whether layers keep nothing of a text but keys and values, and ``attend`` takes keys without queries."""
    lengths = config.rope is not None and config.rope.length_threshold is not None
    return attend in (dense, blocks) and not lengths and all(k.mixer in ("attention", "latent") for k in config.kinds)


def _memory_error(error: Exception, shape: tuple[int, ...]) -> Exception:
    """Out of memory as a message that says what helps; any other failure as it is."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    return ChesError(
        f"out of device memory for batches of {shape[0]} rows x {shape[1]} tokens: lower --batch-tokens, shorten with "
        "--max-length, use --dtype bfloat16 or --param-dtype bfloat16, or shard the weights with --mesh fsdp=N"
    )


def largest_batch(run: ForwardPass, row_tokens: int) -> int:
    """``--batch-tokens auto``: the largest doubling of a row whose program fits in 80 % of what a device has free.

    Backends that do not report their memory (CPU) get one row per device.
    """
    device = run.mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return row_tokens
    free = 0.8 * (stats["bytes_limit"] - stats["bytes_in_use"])
    rows, shards = 1, row_shards(run.mesh)
    while rows < 64:
        try:
            if run.memory(2 * rows * shards, row_tokens) > free:
                break
        except ChesError:
            break
        rows *= 2
    return rows * row_tokens


def fetch(statistics: SegmentStatistics) -> SegmentStatistics:
    """The statistics of this process's rows (``mesh.rows_here``) as numpy arrays in float64, for all that follows."""
    return SegmentStatistics(*(None if a is None else np.asarray(rows_here(a), np.float64) for a in statistics))  # type: ignore[arg-type]
