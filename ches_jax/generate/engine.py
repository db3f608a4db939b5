"""Batches of prompts to tokens: one compiled prefill and one compiled loop of single steps per length of prompts.

Prompts are padded on the left to a *bucket*, a power of two, so that few shapes are compiled; the cache has room for
the bucket and the new tokens. The loop ends when every row has ended. On a data-only mesh each device loops over its
own rows, without a collective; with ``fsdp`` or ``tensor`` the compiler places the collectives.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import ROWS, row_sharding, row_shards
from ches_jax.errors import ChesError
from ches_jax.generate.sampling import WORDS, Sampling, draw, row_keys
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import dense
from ches_jax.models.cache import Cache
from ches_jax.models.decoder import Decoder
from ches_jax.models.precision import accumulate

SMALLEST_BUCKET = 32
SEGMENT = 32
"""New tokens between two looks at the text, where there are stop strings to look for."""


class Prompts(NamedTuple):
    """A batch of prompts; numpy or jax arrays. A row with limit 0 only fills the batch."""

    tokens: Any
    """int32 [B, P], padded on the left."""
    first: Any
    """int32 [B]: index of the first real token."""
    limit: Any
    """int32 [B]: most tokens to make."""
    words: Any
    """uint32 [B, W]: the row's key (``sampling.key_words``)."""


class State(NamedTuple):
    """What a batch has made so far."""

    kept: Cache
    tokens: Any
    """int32 [B, N], 0 where nothing was made."""
    logps: Any
    """[B, N] log-probability of each token, nats."""
    count: Any
    """int32 [B]: tokens made, the stop token included."""
    ended: Any
    """bool [B]: a stop token came."""


_KEPT: Any = PartitionSpec(None, *ROWS)
STATE_SPEC = State(Cache(_KEPT, _KEPT), ROWS, ROWS, ROWS, ROWS)
"""How a state lies on a data-only mesh."""


@dataclass(frozen=True)
class Ask:
    """One text to make."""

    prompt: Sequence[int]
    words: np.ndarray
    limit: int


@dataclass(frozen=True)
class Made:
    """One text that was made."""

    tokens: tuple[int, ...]
    """The stop token included."""
    logps: np.ndarray
    """float64, nats, one per token."""
    ended: bool
    """A stop token came; otherwise the limit or a stop string did."""


def bucket(length: int) -> int:
    """The length a prompt is padded to.

    >>> [bucket(n) for n in (1, 32, 33, 700)]
    [32, 32, 64, 1024]
    """
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class Engine:
    """``engine(asks)`` makes texts of any number of prompts, batch by batch.

    Attributes:
      shapes: (rows, prompt bucket) compiled so far.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        stop_here: Callable[[Sequence[int], Sequence[int]], bool] | None = None,
    ):
        """Takes a model that lies on ``mesh`` as ``partition.placement`` says (or anywhere, for a data-only mesh).

        Args:
          model: the decoder.
          mesh: devices.
          sampling: how tokens are drawn.
          max_new_tokens: most tokens of a text.
          stop_ids: a text ends with any of these.
          stop_here: tells from prompt and tokens of a text whether it has come to its end; asked every ``SEGMENT``
            tokens.
        """
        self.mesh = mesh
        self.max_new_tokens = max_new_tokens
        self.stop_here = stop_here
        self.shapes: list[tuple[int, int]] = []
        graph, state = nnx.split(model)
        whole = mesh.shape["fsdp"] == mesh.shape["tensor"] == 1
        self._state = jax.device_put(state, NamedSharding(mesh, PartitionSpec())) if whole else state
        on = None if whole else mesh
        depends_on_length = any(
            r is not None and r.length_threshold is not None for r in (model.config.rope, model.config.local_rope)
        )

        def lengths(p: Prompts):
            """The longest each sequence can become: it decides which frequencies a sequence rotates with."""
            return p.tokens.shape[1] - p.first + p.limit if depends_on_length else None

        def record(p: Prompts, s: State, step, hidden, model: Decoder) -> State:
            tokens, logps = draw(row_keys(p.words), step, model.logits(hidden), sampling)
            active = ~s.ended & (step < p.limit)
            at = (jnp.int32(0), step)
            stops = jnp.isin(tokens, jnp.asarray(stop_ids, jnp.int32)) if stop_ids else jnp.zeros_like(s.ended)
            return s._replace(
                tokens=lax.dynamic_update_slice(s.tokens, jnp.where(active, tokens, 0)[:, None], at),
                logps=lax.dynamic_update_slice(s.logps, jnp.where(active, logps, 0)[:, None].astype(s.logps.dtype), at),
                count=s.count + active.astype(jnp.int32),
                ended=s.ended | (active & stops),
            )

        def start(state, p: Prompts) -> State:
            model = nnx.merge(graph, state)
            rows, length = p.tokens.shape
            attend = blocks if length > 256 else dense
            hidden, kept = model.prefill(
                p.tokens, p.first, length + max_new_tokens, lengths(p), attend=attend, mesh=on
            )  # fmt: skip
            empty = State(
                kept,
                jnp.zeros((rows, max_new_tokens), jnp.int32),
                jnp.zeros((rows, max_new_tokens), accumulate(hidden.dtype)),
                jnp.zeros((rows,), jnp.int32),
                jnp.zeros((rows,), bool),
            )
            return record(p, empty, jnp.int32(0), hidden[:, -1], model)

        def go_on(state, p: Prompts, s: State, begin, until) -> State:
            model = nnx.merge(graph, state)
            length = p.tokens.shape[1]

            def unfinished(carry):
                step, s = carry
                return (step < until) & (~s.ended & (step < p.limit)).any()

            def one(carry):
                step, s = carry
                last = lax.dynamic_slice_in_dim(s.tokens, step - 1, 1, axis=1)
                hidden, kept = model.extend(last, s.kept, length + step - 1, p.first, lengths(p), mesh=on)
                return step + 1, record(p, s._replace(kept=kept), step, hidden[:, 0], model)

            return lax.while_loop(unfinished, one, (begin, s))[1]

        if whole:
            everywhere = PartitionSpec()
            # check_vma off: loops carry per-device values from constant initial ones
            start = jax.shard_map(
                start, mesh=mesh, in_specs=(everywhere, ROWS), out_specs=STATE_SPEC, check_vma=False
            )  # fmt: skip
            go_on = jax.shard_map(
                go_on,
                mesh=mesh,
                in_specs=(everywhere, ROWS, STATE_SPEC, everywhere, everywhere),
                out_specs=STATE_SPEC,
                check_vma=False,
            )
        self._start = jax.jit(start)
        self._go_on = jax.jit(go_on, donate_argnums=2)

    def batches(self, asks: Sequence[Ask], rows: int) -> Iterator[list[int]]:
        """Numbers of the asks that go together: of one bucket, at most ``rows``, short prompts first."""
        by_bucket: dict[int, list[int]] = {}
        for i, ask in enumerate(asks):
            by_bucket.setdefault(bucket(len(ask.prompt)), []).append(i)
        for _, members in sorted(by_bucket.items()):
            for a in range(0, len(members), rows):
                yield members[a : a + rows]

    def __call__(self, asks: Sequence[Ask], rows: int, tell: Callable[[int], None] = lambda n: None) -> list[Made]:
        """Make all texts in batches of ``rows`` rows (a multiple of the mesh's row shards).

        Raises:
          ChesError: the device has not enough memory.
        """
        assert rows % row_shards(self.mesh) == 0
        made: dict[int, Made] = {}
        for members in self.batches(asks, rows):
            found = self._batch([asks[i] for i in members], rows)
            made.update(zip(members, found, strict=True))
            tell(len(members))
        return [made[i] for i in range(len(asks))]

    def _batch(self, asks: Sequence[Ask], rows: int) -> list[Made]:
        prompts = padded(asks, rows)
        shape = prompts.tokens.shape
        try:
            made = self._run(prompts, asks)
        except jax.errors.JaxRuntimeError as e:
            raise _told(e, shape, self.max_new_tokens) from e
        if shape not in self.shapes:
            self.shapes.append(shape)
        return made

    def _run(self, prompts: Prompts, asks: Sequence[Ask]) -> list[Made]:
        here = jax.device_put(prompts, row_sharding(self.mesh))
        state = self._start(self._state, here)
        most = int(prompts.limit.max())
        stopped = np.zeros(len(prompts.limit), bool)
        for begin in range(1, most, most if self.stop_here is None else SEGMENT):
            until = most if self.stop_here is None else min(begin + SEGMENT, most)
            state = self._go_on(self._state, here, state, jnp.int32(begin), jnp.int32(until))
            if self.stop_here is not None:
                stopped |= self._stopped(state, asks)
                if (stopped | np.asarray(state.ended) | (np.asarray(state.count) >= prompts.limit)).all():
                    break
                # ended rows make nothing more; whether a stop token ended them is told apart below
                ended = jax.device_put(np.asarray(state.ended) | stopped, row_sharding(self.mesh))
                state = state._replace(ended=ended)
        tokens, logps, count, ended = (np.asarray(a) for a in state[1:])
        return [
            Made(tuple(tokens[i, :n].tolist()), logps[i, :n].astype(np.float64), bool(ended[i] and not stopped[i]))
            for i, n in enumerate(count[: len(asks)].tolist())
        ]

    def _stopped(self, state: State, asks: Sequence[Ask]) -> np.ndarray:
        """Which texts that go on hold a stop string."""
        assert self.stop_here is not None
        tokens, count, ended = (np.asarray(a) for a in (state.tokens, state.count, state.ended))
        out = np.zeros(len(count), bool)
        for i, ask in enumerate(asks):
            out[i] = not ended[i] and self.stop_here(ask.prompt, tokens[i, : count[i]].tolist())
        return out


def padded(asks: Sequence[Ask], rows: int) -> Prompts:
    """The batch of prompts of one bucket."""
    length = max(bucket(len(a.prompt)) for a in asks)
    tokens = np.zeros((rows, length), np.int32)
    first = np.full(rows, length - 1, np.int32)  # a row that fills the batch is one token long
    limit = np.zeros(rows, np.int32)
    words = np.zeros((rows, WORDS), np.uint32)
    for i, ask in enumerate(asks):
        first[i] = length - len(ask.prompt)
        tokens[i, first[i] :] = ask.prompt
        limit[i], words[i] = ask.limit, ask.words
    return Prompts(tokens, first, limit, words)


def _told(error: Exception, shape: tuple[int, int], new: int) -> Exception:
    """Out of memory as a message that helps; any other failure as it is."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    return ChesError(
        f"out of device memory for batches of {shape[0]} rows x {shape[1]} + {new} tokens: lower --batch-size or "
        "--max-new-tokens, use --dtype bfloat16, or deal the weights out with --mesh fsdp=N"
    )
