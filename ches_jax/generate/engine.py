"""Batches of prompts to tokens: one compiled prefill and one compiled loop of single steps per length of prompts.

The cache has room for the new tokens behind a *bucket*, a power of two, at whose end a prompt is, so that few shapes
are compiled. The prompts themselves go through the model packed (``packing``); where layers keep a state, and where
weights are sharded, each has a row of its own. The loop ends when every row has ended. On a data-only mesh each device
loops over its own rows, without a collective; with other axes the compiler places the collectives. On one CPU device
batches are computed side by side (``distributed.under_way``): a step's operations are too small for several threads.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from threading import Event, Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import (
    ROWS,
    put_own_rows,
    row_sharding,
    row_shards,
    spans_processes,
    weights_are_whole,
)
from ches_jax.distributed.under_way import UnderWay
from ches_jax.errors import ChesError
from ches_jax.generate.packing import (
    Prompts,
    Request,
    Shape,
    Stream,
    apart_shape,
    arrays,
    bucket,
    held,
    packed_shape,
)
from ches_jax.generate.sampling import Sampling, draw, row_keys
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import dense
from ches_jax.models.decoder import Decoder, cache_stacked, layer_by_layer, named_parameters, packs_prompts
from ches_jax.models.platform import platform
from ches_jax.models.precision import accumulate
from ches_jax.models.stacks import ROOT
from ches_jax.runs.work import Positions

SMALLEST_APART = 2**24
LARGEST_APART = 2**32
"""Bytes of the layers between which new tokens run through copies of them (``runs_apart``)."""
LONGEST_DENSE = 256
"""Rows up to so long are attended to in one piece: there are few blocks to leave out."""
SEGMENT = 32
"""New tokens between two looks at the text, where there are stop strings to look for."""


class State(NamedTuple):
    """What a batch has made so far."""

    cache: Any
    """``models.cache.Cache``."""
    tokens: Any
    """int32 [B, N], 0 where nothing was made."""
    logps: Any
    """[B, N] log-probability of each token, nats."""
    count: Any
    """int32 [B]: tokens made, the stop token included."""
    ended: Any
    """bool [B]: a stop token came."""


_CACHE_SPEC: Any = PartitionSpec(None, *ROWS)
STATE_SPEC = State(_CACHE_SPEC, ROWS, ROWS, ROWS, ROWS)
"""How a state lies on a data-only mesh."""


@dataclass(frozen=True)
class Completion:
    """One text that was made."""

    tokens: tuple[int, ...]
    """The stop token included."""
    logps: np.ndarray
    """float64, nats, one per token."""
    ended: bool
    """A stop token came; otherwise the limit or a stop string did."""


class _Made(NamedTuple):
    """What came of a batch."""

    completions: list[Completion]
    positions: dict[str, int]
    """Arguments of ``Positions.add``."""


def _depends_on_length(model: Decoder) -> bool:
    """Whether a sequence's length decides which frequencies it rotates with."""
    ropes = (model.config.rope, model.config.local_rope)
    return any(r is not None and r.length_threshold is not None for r in ropes)


def runs_apart(model: Decoder) -> bool:
    """Whether new tokens run through layers that lie apart (``Decoder.layers_apart``): on a CPU, where it is faster.

    Not for layers that stay in the processor's cache, where it only takes longer to compile, and not where a second
    copy of the weights may not fit.
    """
    if platform() != "cpu":
        return False
    sizes = (leaf.nbytes for name, leaf in named_parameters(model).items() if name.startswith(f"{ROOT}."))
    return SMALLEST_APART <= sum(sizes) <= LARGEST_APART


@dataclass(frozen=True)
class Decoding:
    """The two compiled functions of an engine: the prompts with their first tokens, and the loop over further ones."""

    graph: nnx.GraphDef
    sampling: Sampling
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    mesh: Mesh | None
    """Where the weights are sharded; None where every device has them whole."""
    by_length: bool
    packed: bool
    """Prompts lie end to end in the stream; otherwise each is at the end of its own row of a bucket's length."""

    def _lengths(self, p: Prompts) -> Any:
        """The longest each sequence can become, where that decides its frequencies."""
        return p.source.shape[1] - p.first + p.limit if self.by_length else None

    def _append(self, p: Prompts, s: State, step: Any, hidden: Any, model: Decoder) -> State:
        """The state with token ``step`` of every row that is not finished."""
        tokens, logps = draw(row_keys(p.keys), step, model.next_logits(hidden, mesh=self.mesh), self.sampling)
        active = ~s.ended & (step < p.limit)
        at = (jnp.int32(0), step)
        ids = jnp.asarray(self.stop_ids, jnp.int32)
        stops = jnp.isin(tokens, ids) if self.stop_ids else jnp.zeros_like(s.ended)
        return s._replace(
            tokens=lax.dynamic_update_slice(s.tokens, jnp.where(active, tokens, 0)[:, None], at),
            logps=lax.dynamic_update_slice(s.logps, jnp.where(active, logps, 0)[:, None].astype(s.logps.dtype), at),
            count=s.count + active.astype(jnp.int32),
            ended=s.ended | (active & stops),
        )

    def prefill(self, state: Any, stream: Stream, p: Prompts) -> State:
        """The prompts through the model once, and the first token of every row."""
        model = nnx.merge(self.graph, state)
        rows, length = p.source.shape
        slots = length + self.max_new_tokens
        attend = blocks if stream.tokens.shape[1] > LONGEST_DENSE else dense
        if self.packed:
            last, cache = model.prefill_packed(
                stream.tokens, stream.start, stream.longest, p.source, slots, attend=attend
            )
        else:
            hidden, cache = model.prefill(
                stream.tokens, p.first, slots, self._lengths(p), attend=attend, mesh=self.mesh
            )
            last = hidden[:, -1]
        empty = State(
            cache,
            jnp.zeros((rows, self.max_new_tokens), jnp.int32),
            jnp.zeros((rows, self.max_new_tokens), accumulate(last.dtype)),
            jnp.zeros((rows,), jnp.int32),
            jnp.zeros((rows,), bool),
        )
        return self._append(p, empty, jnp.int32(0), last, model)

    def decode(self, state: Any, apart: Any, p: Prompts, s: State, begin: Any, until: Any) -> State:
        """Tokens ``begin`` to ``until`` of every row that is not finished; stops early where all are."""
        model = nnx.merge(self.graph, state)
        length, lengths = p.source.shape[1], self._lengths(p)
        if apart is not None:
            # within the program, where they share one allocation of large pages
            s = s._replace(cache=layer_by_layer(model.config, s.cache))

        def unfinished(carry):
            step, s, _ = carry
            return (step < until) & (~s.ended & (step < p.limit)).any()

        def rotations(step):
            return model.rotations_at(length + step - 1, p.first, lengths)

        def next_token(carry):
            step, s, turned = carry
            last = lax.dynamic_slice_in_dim(s.tokens, step - 1, 1, axis=1)
            hidden, cache = model.extend(
                last, s.cache, length + step - 1, p.first, lengths, apart=apart, rotations=turned, mesh=self.mesh
            )
            s = self._append(p, s._replace(cache=cache), step, hidden[:, 0], model)
            return step + 1, s, rotations(step + 1)

        s = lax.while_loop(unfinished, next_token, (begin, s, rotations(begin)))[1]
        return s if apart is None else s._replace(cache=cache_stacked(model.config, s.cache))


def _on_each_device(prefill: Callable, decode: Callable, mesh: Mesh) -> tuple[Callable, Callable]:
    """Both functions with the rows sharded and the weights replicated: no device waits for another."""
    whole = PartitionSpec()
    # check_vma off: loops carry per-device values from constant initial ones
    options: dict[str, Any] = {"mesh": mesh, "out_specs": STATE_SPEC, "check_vma": False}
    return (
        jax.shard_map(prefill, in_specs=(whole, ROWS, ROWS), **options),
        jax.shard_map(decode, in_specs=(whole, whole, ROWS, STATE_SPEC, whole, whole), **options),
    )


@lru_cache(maxsize=16)
def decoding_programs(decoding: Decoding, mesh: Mesh) -> tuple[Any, Any]:
    """Prefill and decode as functions of arrays alone: engines that differ in weights only share what jax compiles."""
    prefill, decode = decoding.prefill, decoding.decode
    if decoding.mesh is None:
        prefill, decode = _on_each_device(prefill, decode, mesh)
    return jax.jit(prefill), jax.jit(decode, donate_argnums=3)


class Engine:
    """``engine(requests)`` makes texts of any number of prompts, batch by batch.

    Attributes:
      shapes: what was compiled so far.
      counted: positions that went through the model so far, of prompts and of new tokens; equal prompts of a batch are
        computed once.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        stop_check: Callable[[Sequence[int], Sequence[int]], bool] | None = None,
    ):
        """Takes a model that lies on ``mesh`` as ``sharding.placement`` says (or anywhere, for a data-only mesh).

        Args:
          model: the decoder.
          mesh: devices.
          sampling: how tokens are drawn.
          max_new_tokens: most tokens of a text.
          stop_ids: a text ends with any of these ids.
          stop_check: whether a text has come to its end, from its prompt and tokens; called every ``SEGMENT``
            tokens, by one thread at a time.
        """
        self.mesh = mesh
        self.under_way = UnderWay(mesh)
        self.max_new_tokens = max_new_tokens
        self.stop_check = stop_check
        self._checking = Lock()
        self.shapes: list[Shape] = []
        self.counted = Positions()
        graph, state = nnx.split(model)
        whole = weights_are_whole(mesh)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._state = jax.device_put(state, everywhere) if whole else state
        self._apart = None
        if whole and runs_apart(model):
            split = jax.jit(lambda state: nnx.merge(graph, state).layers_apart(), out_shardings=everywhere)
            self._apart = split(self._state)
        self._parts = row_shards(mesh)
        self._packs = whole and packs_prompts(model.config)
        by_length = _depends_on_length(model)
        decoding = Decoding(
            graph, sampling, max_new_tokens, tuple(stop_ids), None if whole else mesh, by_length, self._packs
        )
        self._prefill, self._decode = decoding_programs(decoding, mesh)
        self._compiled_prefill: dict[Shape, Any] = {}
        self._compiled_decode: dict[Shape, Any] = {}

    def batches(self, requests: Sequence[Request], rows: int) -> Iterator[tuple[Shape, list[int]]]:
        """Numbers of the requests that go together, ``rows`` of them while there are so many; short prompts first.

        All batches whose longest prompts are of one bucket have one shape, which follows from these requests alone: a
        text is the same in every run.
        """
        buckets = [bucket(len(request.prompt)) for request in requests]
        order = sorted(range(len(requests)), key=buckets.__getitem__)
        batches = [order[a : a + rows] for a in range(0, len(order), rows)]
        for size, of_bucket in groupby(batches, key=lambda batch: buckets[batch[-1]]):
            same = list(of_bucket)
            if self._packs:
                shape = packed_shape([[requests[i] for i in batch] for batch in same], rows, self._parts)
            else:
                shape = apart_shape(rows, self._parts, size)
            yield from ((shape, batch) for batch in same)

    def __call__(
        self, requests: Sequence[Request], rows: int, progress: Callable[[int], None] = lambda n: None
    ) -> list[Completion]:
        """Make all texts in batches of ``rows`` rows (a multiple of the mesh's row shards).

        Raises:
          ChesError: the device has not enough memory.
        """
        assert rows % self._parts == 0
        texts: dict[int, Completion] = {}
        waiting: deque[tuple[Shape, list[int], Callable[[], _Made | None]]] = deque()
        given_up = Event()

        def collect() -> None:
            shape, members, result = waiting.popleft()
            made = result()
            assert made is not None
            # here and in the order of the batches, whichever is ready first
            if shape not in self.shapes:
                self.shapes.append(shape)
            self.counted.add(**made.positions)
            texts.update(zip(members, made.completions, strict=True))
            progress(len(members))

        try:
            for shape, members in self.batches(requests, rows):
                launch = self._prepared([requests[i] for i in members], shape, given_up)
                waiting.append((shape, members, self.under_way(launch)))
                # one more than there are threads, so that none waits for the oldest batch
                while len(waiting) > (self.under_way.count if self.under_way.count > 1 else 0):
                    collect()
            while waiting:
                collect()
        finally:
            given_up.set()
        return [texts[i] for i in range(len(requests))]

    def _prepared(self, requests: Sequence[Request], shape: Shape, given_up: Event) -> Callable[[], _Made | None]:
        """What makes the texts of a batch; where batches are computed side by side, compiled, for any thread.

        It gives None, at once, where the other batches have been given up before it begins.
        """
        stream, prompts = arrays(requests, shape, self._parts)
        with _explained(shape, self.max_new_tokens):
            prefill, decode = self._programs(shape, stream, prompts)

        def launch() -> _Made | None:
            if given_up.is_set():
                return None
            with _explained(shape, self.max_new_tokens):
                return self._run(prefill, decode, stream, prompts, requests)

        return launch

    def _programs(self, shape: Shape, stream: Stream, prompts: Prompts) -> tuple[Any, Any]:
        """Prefill and decode for batches of a shape, of which these are the arrays of one.

        Compiled here where batches are computed side by side: what jax compiles in another thread is compiled without
        this thread's settings, such as double precision, and by several threads at once.
        """
        if self.under_way.count == 1:
            return self._prefill, self._decode
        rows = partial(jax.tree.map, partial(_like, sharding=row_sharding(self.mesh)))
        if shape not in self._compiled_prefill:
            self._compiled_prefill[shape] = self._prefill.lower(self._state, rows(stream), rows(prompts)).compile()
        prefill = self._compiled_prefill[shape]
        if prompts.limit.max() > 1 and shape not in self._compiled_decode:
            state = jax.tree.map(_like, prefill.out_info, prefill.output_shardings)
            step = np.int32(1)
            decode = self._decode.lower(self._state, self._apart, rows(prompts), state, step, step)
            self._compiled_decode[shape] = decode.compile()
        return prefill, self._compiled_decode.get(shape)

    def _run(self, prefill: Any, decode: Any, stream: Stream, prompts: Prompts, requests: Sequence[Request]) -> _Made:
        on_mesh = put_own_rows(prompts, self.mesh)
        state = prefill(self._state, put_own_rows(stream, self.mesh), on_mesh)
        most = int(prompts.limit.max())
        stopped = np.zeros(len(prompts.limit), bool)
        for begin in range(1, most, most if self.stop_check is None else SEGMENT):
            until = most if self.stop_check is None else min(begin + SEGMENT, most)
            state = decode(self._state, self._apart, on_mesh, state, np.int32(begin), np.int32(until))
            if self.stop_check is not None:
                stopped |= self._stopped(state, requests)
                _, _, count, ended = self._fetch(state)
                if (stopped | ended | (count >= prompts.limit)).all():
                    break
                # ended rows make nothing more; whether a stop token ended them is decided below
                state = state._replace(ended=put_own_rows(ended | stopped, self.mesh))
        tokens, logps, count, ended = self._fetch(state)
        completions = [
            Completion(
                tuple(tokens[i, :n].tolist()), logps[i, :n].astype(np.float64), bool(ended[i] and not stopped[i])
            )
            for i, n in enumerate(count[: len(requests)].tolist())
        ]
        return _Made(completions, self._positions(stream, count, requests))

    def _positions(self, stream: Stream, made: np.ndarray, requests: Sequence[Request]) -> dict[str, int]:
        """Those of a batch: its prompts, and a step for each token of a text but the last, which no state follows.

        Rows that lie apart (a data-only mesh) take the steps of their own longest text, others those of the batch.
        """
        parts = self._parts if weights_are_whole(self.mesh) else 1
        steps = np.maximum(made - 1, 0)
        rows = len(made) // parts
        of_texts = int(steps[: len(requests)].sum())
        return {
            "computed": stream.tokens.size + rows * int(steps.reshape(parts, rows).max(axis=1).sum()),
            "used": held(stream) + of_texts,
            "apart": sum(len(a.prompt) for a in requests) + of_texts,
        }

    def _fetch(self, state: State) -> tuple[np.ndarray, ...]:
        """Tokens, log-probabilities, counts and ends of all rows."""
        found = state[1:]
        if spans_processes(self.mesh):
            found = jax.jit(lambda *a: a, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(*found)
        return tuple(np.asarray(a) for a in found)

    def _stopped(self, state: State, requests: Sequence[Request]) -> np.ndarray:
        """Which unfinished texts contain a stop string."""
        assert self.stop_check is not None
        tokens, _, count, ended = self._fetch(state)
        out = np.zeros(len(count), bool)
        with self._checking:
            for i, request in enumerate(requests):
                out[i] = not ended[i] and self.stop_check(request.prompt, tokens[i, : count[i]].tolist())
        return out


def _like(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """An array that lies so, for the compiler."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


@contextmanager
def _explained(shape: Shape, new: int) -> Iterator[None]:
    """Out of memory within the block as a message that helps; any other failure as it is."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise ChesError(
            f"out of device memory for batches of {shape.rows} rows x {shape.bucket} + {new} tokens: lower "
            "--batch-size or --max-new-tokens, use --dtype bfloat16, or shard the weights with --mesh fsdp=N"
        ) from e
