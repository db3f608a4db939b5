"""A decoder-only language model: ``hidden`` up to and with the final norm, ``logits`` from there.

The two calls are apart because scores need no logits, and log-probabilities need them only at a few positions:
``hidden`` returns h, the vector that multiplies the unembedding matrix W, and ``logits(h) = cap(scale * h W^T)``.

Parameters of the layers are stacked on a leading axis and the layers run in ``lax.scan``: one layer is compiled,
whatever the depth (measured in experiments/benchmarks). Layers of several kinds are several stacks (``stacks``).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ches_jax.distributed.mesh import LogicalMesh
from ches_jax.errors import ChesError
from ches_jax.models import cache, rope
from ches_jax.models.attention import dense
from ches_jax.models.attention.block_sparse import by_block
from ches_jax.models.attention.dense import Attend
from ches_jax.models.attention.mask import KeyRanges, SeenByBlock, Visibility, causal, key_ranges, within
from ches_jax.models.cache import Cache, Memory
from ches_jax.models.config import DecoderConfig
from ches_jax.models.experts import balance_loss
from ches_jax.models.head import from_products
from ches_jax.models.kinds import MIXERS, Layer
from ches_jax.models.layers import Context, Embedding, LayerData, Norm, Rotations, matmul
from ches_jax.models.per_layer import PerLayer
from ches_jax.models.precision import accumulate
from ches_jax.models.sharding import (
    attention_on,
    explicit,
    keep_rows,
    mesh_here,
    with_auto_axes,
)
from ches_jax.models.stacks import ROOT, Stack, layer_groups, stacks
from ches_jax.models.vocabulary import looked_up, products

ArrayOrNumpy = Array | np.ndarray
NO_WINDOW = 2**30
PRODUCTS_AND_ATTENTION = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(dense.KEPT),
)
"""Checkpoint policy of the layers: matmuls and attention are kept for the backward pass; the rest is elementwise."""


def two_axes(tokens: Any) -> Array:
    """Token ids as an array [rows, tokens].

    Raises:
      ChesError: they have another number of axes.

    >>> two_axes([[1, 2]]).shape
    (1, 2)
    """
    ids = jnp.asarray(tokens)
    if ids.ndim != 2:
        raise ChesError(f"tokens have the shape {ids.shape}; expected [rows, tokens] (one sequence: tokens[None])")
    return ids


class Decoder(nnx.Module):
    """A decoder of any supported family; see ``DecoderConfig`` for what can differ.

    Called with token ids it gives logits; ``hidden`` stops before the unembedding and ``logits`` continues from there.

    Args:
      config: the architecture.
      rngs: a stream named ``params`` for the initial weights.
      param_dtype: dtype the parameters are stored in.
      dtype: dtype of the computation.

    Attributes:
      config: the architecture.
      dtype: dtype of the computation.
      mesh: where the parameters lie, if on a mesh that ``load_model`` was given; calls run there by default.

    Example:
      >>> from ches_jax.models import load_model
      >>> model = load_model("bundled")
      >>> tokens = jnp.array([[5, 6, 7]])
      >>> model(tokens).shape == (1, 3, model.config.vocab_size)
      True
      >>> bool((model(tokens) == model.logits(model.hidden(tokens))).all())
      True
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = "float32",
        dtype: DTypeLike = "float32",
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.mesh: LogicalMesh | None = None
        param_dtype = jnp.dtype(param_dtype)
        self.embed_tokens = Embedding(config.vocab_size, config.width, rngs=rngs, dtype=param_dtype)
        self.embed_positions = (
            Embedding(config.max_positions, config.width, rngs=rngs, dtype=param_dtype) if config.rope is None else None
        )
        self.per_layer = None if config.per_layer_width is None else PerLayer(config, rngs=rngs, dtype=param_dtype)
        self.layers = _stacked_layers(config, rngs, param_dtype)
        self.norm = Norm(config.width, config, dtype=param_dtype)
        self.lm_head = (
            None if config.tie_embeddings else Embedding(config.vocab_size, config.width, rngs=rngs, dtype=param_dtype)
        )

    def __call__(
        self,
        tokens: Int[ArrayOrNumpy, "B T"] | Sequence[Sequence[int]],
        positions: Int[ArrayOrNumpy, "B T"] | None = None,
        mask: Bool[ArrayOrNumpy, "B T"] | Visibility | None = None,
        lengths: Int[ArrayOrNumpy, "B T"] | None = None,
        *,
        attend: Attend = dense.dense,
        remat: bool = False,
        mesh: Mesh | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position: ``logits(hidden(...))``, whose arguments these are.

        Every position sees itself and what is before it in its row. float32 at least. The array has a number for every
        token of the vocabulary at every position: for log-probabilities of given tokens ``models.logprobs`` never holds
        it whole.
        """
        h = self.hidden(two_axes(tokens), positions, mask, lengths, attend=attend, remat=remat, mesh=mesh)
        return self._logits(h, mesh)

    def stack(self, name: str) -> Layer:
        """The stacked layers of that name (``stacks.stacks``)."""
        return self.layers if name == ROOT else self.layers[name.removeprefix(f"{ROOT}.")]

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """W: row z is the unembedding of token z."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def hidden(
        self,
        tokens: Int[ArrayOrNumpy, "B T"],
        positions: Int[ArrayOrNumpy, "B T"] | None = None,
        mask: Bool[ArrayOrNumpy, "B T"] | Visibility | None = None,
        lengths: Int[ArrayOrNumpy, "B T"] | None = None,
        *,
        attend: Attend = dense.dense,
        remat: bool = False,
        mesh: Mesh | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm: what multiplies the unembedding matrix.

        Args:
          tokens: token ids.
          positions: position of each token in its own sequence; default: counted from the first real token.
          mask: True on real tokens (padding on either side), or a ``Visibility`` for rows that hold several sequences;
            default: every token is real.
          lengths: length of the sequence each token belongs to, 0 of padding, whose states need not be computed; rope
            kinds that depend on it read it; default: the largest position of the row plus one.
          attend: how attention is computed (``attention.choose``); not all ways have a gradient.
          remat: recompute layers in the backward pass instead of keeping their activations.
          mesh: where parameters (``sharding.placement``) and rows lie; default: the model's own ``mesh``, if any.

        Returns:
          h, in the compute dtype. States of padding are finite and mean nothing.

        Raises:
          ValueError: a ``Visibility`` without positions.
          ChesError: tokens of another shape, or the context mesh (``jax.set_mesh``) is not the model's.
        """
        tokens = two_axes(tokens)
        logical = mesh_here(mesh, self.mesh)
        if logical is not None and explicit(logical):
            return with_auto_axes(
                self,
                logical,
                lambda model, *arrays: model.hidden(*arrays, attend=attend, remat=remat, mesh=mesh),
                (tokens, positions, mask, lengths),
                logical.spec(PartitionSpec(*logical.rows(tokens.shape[0]), None, None)),
            )
        if mask is None:
            mask = jnp.ones(tokens.shape, bool)
        if not isinstance(mask, Visibility):
            if positions is None:
                positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
            mask = causal(jnp.asarray(mask))
        if positions is None:
            raise ValueError("positions are needed with a Visibility")
        x, context, data = self._start(tokens, positions, key_ranges(mask), lengths, attend, logical)
        return self.norm(self._run_layers(x, context, data, logical, remat=remat).stream)

    def hidden_and_layers(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        seen: Visibility,
        lengths: Int[Array, "B T"],
        tap: Callable[[Float[Array, "B T D"]], Array],
        *,
        attend: Attend = dense.dense,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Array]:
        """``hidden``, and what ``tap`` makes of the stream behind each layer, before the final norm.

        Args:
          tokens: as for ``hidden``, and so what follows it.
          positions: position of each token in its own sequence.
          seen: what each position sees.
          lengths: length of each token's sequence.
          tap: from the stream to what is kept of a layer, of the same shape for all; the layers come on a leading axis.
          attend: how attention is computed.
          mesh: where parameters and rows lie.
        """
        logical = self.auto_mesh(mesh)
        x, context, data = self._start(tokens, positions, key_ranges(seen), lengths, attend, logical)
        ran = self._run_layers(x, context, data, logical, tap=tap)
        assert ran.tapped is not None
        return self.norm(ran.stream), ran.tapped

    def hidden_and_balance(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        seen: Visibility,
        lengths: Int[Array, "B T"],
        counted: Bool[Array, "B T"],
        *,
        attend: Attend = dense.dense,
        remat: bool = False,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """``hidden``, and the load-balancing loss of the routers over the tokens that are counted.

        Args:
          tokens: as for ``hidden``, and so what follows it.
          positions: position of each token in its own sequence.
          seen: what each position sees.
          lengths: length of each token's sequence.
          counted: True on real tokens.
          attend: how attention is computed.
          remat: recompute layers in the backward pass.
          mesh: where parameters and rows lie.
        """
        logical = self._decoding_mesh(mesh)
        x, context, data = self._start(tokens, positions, key_ranges(seen), lengths, attend, logical)
        x, _, sums, _ = self._run_layers(x, context._replace(counted=counted), data, logical, remat=remat)
        layers = sum(kind.mlp == "routed" for kind in self.config.kinds)
        assert sums is not None
        return self.norm(x), balance_loss(sums, layers * counted.sum().astype(sums.dtype))

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        first: Int[Array, " B"],
        slots: int,
        lengths: Int[Array, " B"] | None = None,
        *,
        attend: Attend = dense.dense,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """``hidden`` of rows padded on the left, and their keys and values in a cache of ``slots`` slots.

        Args:
          tokens: token ids; row b is real from index ``first[b]`` on.
          first: see ``models.cache``.
          slots: room in the cache, T at least.
          lengths: length of each whole sequence, for rope kinds that depend on it; default: that of the prompt.
          attend: how attention is computed.
          mesh: as for ``hidden``.
        """
        logical = self._decoding_mesh(mesh)
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        ranges, positions = key_ranges(causal(index >= first[:, None])), jnp.maximum(index - first[:, None], 0)
        x, context, data = self._start(tokens, positions, ranges, _per_token(lengths, positions), attend, logical)
        x, filled, *_ = self._run_layers(
            x, context, data, logical, kept=empty_cache(self.config, len(tokens), slots, self.dtype)
        )
        assert filled is not None
        return self.norm(x), filled

    def prefill_packed(
        self,
        tokens: Int[Array, "R T"],
        start: Int[Array, "R T"],
        lengths: Int[Array, "R T"],
        source: Int[Array, "B P"],
        slots: int,
        *,
        attend: Attend = dense.dense,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """``prefill`` of prompts that lie end to end in rows: states of their last tokens, and the cache of B texts.

        Args:
          tokens: token ids.
          start: index of the first token of the prompt that a position belongs to.
          lengths: as for ``hidden``.
          source: where each slot's token is, see ``cache.unpacked``; of the last slot, that of the prompt's last token.
          slots: room in the cache, P at least.
          attend: how attention is computed.

        Only where ``packs_prompts``.
        """
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        none = jnp.zeros(tokens.shape, jnp.int32)
        ranges = key_ranges(Visibility(none, none, start))
        x, context, data = self._start(tokens, index - start, ranges, lengths, attend, None)
        room = empty_cache(self.config, len(tokens), tokens.shape[1], self.dtype)
        x, filled, *_ = self._run_layers(x, context, data, None, kept=room)
        assert filled is not None
        return self.norm(x.reshape(-1, x.shape[-1])[source[:, -1]]), cache.unpacked(filled, source, slots)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        kept: Cache,
        slot: Int[Array, ""],
        first: Int[Array, " B"],
        lengths: Int[Array, " B"] | None = None,
        *,
        apart: tuple[nnx.State, ...] | None = None,
        rotations: Rotations | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of the next tokens of each row, and the cache with them in it.

        Args:
          tokens: go into slots ``slot``, ``slot + 1``, ...
          kept: the cache of everything before them.
          slot: the same for all rows.
          first: first slot of each row's text, see ``models.cache``.
          lengths: length of each whole sequence, for rope kinds that depend on it; default: that so far.
          apart: ``layers_apart``; the cache is one ``layer_by_layer`` then, and no layer is in a scan.
          rotations: ``rotations_at`` of these slots.
          mesh: as for ``hidden``.
        """
        logical = self._decoding_mesh(mesh)
        slots = slot + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = slots[None] - first[:, None]
        ranges = cache.visibility(first, slots)
        lengths_of = _per_token(lengths, positions)
        x, context, data = self._start(tokens, positions, ranges, lengths_of, dense.dense, logical, rotations)
        if apart is None:
            x, filled, *_ = self._run_layers(x, context, data, logical, kept=kept, slot=slot)
        else:
            x, filled = self._run_apart(apart, x, context, data, kept, slot)
        assert filled is not None
        return self.norm(x), filled

    def rotations_at(
        self, slot: Int[Array, ""], first: Int[Array, " B"], lengths: Int[Array, " B"] | None = None
    ) -> Rotations:
        """Cosines and sines with which ``extend`` rotates a token of each row in that slot.

        A loop that carries them from one step to the next has XLA compute them once: within a step, where the layers
        lie apart, it does so in every layer, for each element that is rotated.
        """
        positions = slot - first[:, None]
        of_tokens = _per_token(lengths, positions)
        return self._rotations(positions, positions + 1 if of_tokens is None else of_tokens)

    def layers_apart(self) -> tuple[nnx.State, ...]:
        """The parameters of every layer by themselves, in order: copies of those that are stacked."""
        return layer_by_layer(self.config, [nnx.state(self.stack(stack.name)) for stack in stacks(self.config)])

    def hidden_behind(
        self,
        before: Cache,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        ranges: KeyRanges,
        keys: Int[Array, "B S"],
        lengths: Int[Array, "B T"],
        *,
        attend: Attend = dense.dense,
    ) -> Float[Array, "B T D"]:
        """``hidden`` of rows that attend to a text besides themselves; layers must all attend.

        Args:
          before: the text, from ``prefill`` of one row.
          tokens: as for ``hidden``, and so the positions and lengths.
          positions: position of each token in its own sequence.
          ranges: which of the keys each token sees.
          keys: the keys of each row, numbered from the first of the text through to the last of the row.
          lengths: length of each token's sequence.
          attend: how attention is computed.
        """
        x, context, data = self._start(tokens, positions, ranges, lengths, attend, None)
        return self.norm(self._run_layers(x, context._replace(keys=keys), data, None, kept=before).stream)

    def auto_mesh(self, mesh: Mesh | None) -> LogicalMesh | None:
        """``mesh_here``; None where the compiler does not choose shardings, on a mesh with explicit axes."""
        logical = mesh_here(mesh, self.mesh)
        return None if explicit(logical) else logical

    def _decoding_mesh(self, mesh: Mesh | None) -> LogicalMesh | None:
        """``mesh_here`` for calls that leave shardings to the compiler."""
        logical = mesh_here(mesh, self.mesh)
        if explicit(logical):
            raise ChesError(
                "decoding with a cache runs on a mesh with auto axes: make it with axis_types=(AxisType.Auto, ...)"
            )
        return logical

    def _start(
        self,
        tokens,
        positions,
        ranges: KeyRanges,
        lengths: Int[ArrayOrNumpy, "B T"] | None,
        attend: Attend,
        logical: LogicalMesh | None,
        rotations: Rotations | None = None,
    ) -> tuple[Float[Array, "B T D"], Context, LayerData]:
        """Embedded tokens, what every layer needs besides them, and what each does."""
        c = self.config
        if lengths is None:
            lengths = jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
        positions, lengths = jnp.asarray(positions), jnp.asarray(lengths)
        x = looked_up(self.embed_tokens.weight[...], jnp.asarray(tokens), self.dtype, logical)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, self.dtype)
        if self.embed_positions is not None:
            table = self.embed_positions.weight[...]
            x = x + looked_up(table, positions, self.dtype, logical, "embed_positions.weight")
        given = None if self.per_layer is None else self.per_layer(jnp.asarray(tokens), x, logical)
        if rotations is None:
            rotations = self._rotations(positions, lengths)
        seen = self._seen_by_all(ranges, attend)
        attend = attention_on(logical, attend)
        context = Context(ranges, rotations, positions, attend, logical, _used(lengths), seen=seen)
        return keep_rows(x, logical), context, layer_data(c)._replace(given=given)

    def _seen_by_all(self, ranges: KeyRanges, attend: Attend) -> tuple[KeyRanges, SeenByBlock | None] | None:
        """What ``visible_to`` finds in every layer, once for all; None where layers differ."""
        windows = set(self.config.windows)
        if len(windows) > 1 or self.config.chunked:
            return None
        (window,) = windows
        seen = ranges if window is None else within(ranges, jnp.int32(window))
        return seen, by_block(attend, seen)

    def _rotations(self, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> Rotations:
        """Cosines and sines of the layers' rotations: of each kind of layer that has its own."""
        ropes = [r for r in (self.config.rope, self.config.local_rope) if r is not None]
        return tuple(rope.tables(r, positions, lengths, accumulate(self.dtype)) for r in ropes)

    def _run_layers(
        self,
        x,
        context: Context,
        data: LayerData,
        logical: LogicalMesh | None,
        *,
        remat: bool = False,
        kept: Cache | None = None,
        slot: Int[Array, ""] | None = None,
        tap: Callable[[Array], Array] | None = None,
    ) -> "_Ran":
        """The layers, one after the other, each group of them in a scan over its stacked parameters.

        With ``kept`` every layer leaves there what later tokens need; with ``slot`` too it reads what is there. With
        ``tap`` what it makes of the stream behind each layer is kept.
        """
        parts = {stack.name: nnx.split(self.stack(stack.name)) for stack in stacks(self.config)}
        caches = dict(zip(parts, kept or (None,) * len(parts), strict=True))

        def one_layer(graph, x, lent, memory_of, weights, data, number):
            memory = Memory(memory_of, number, slot, logical, context.keys)
            routing: list[Array] = []
            here = context._replace(lent=lent, routing=routing)
            x = keep_rows(nnx.merge(graph, weights)(x, here, data, memory), logical)
            return x, lent | memory.lent, memory.kept, routing

        lent: dict[str, tuple[Array, Array]] = {}
        e = self.config.experts
        routed = None if e is None or context.counted is None else jnp.zeros((2, e.count), accumulate(self.dtype))
        # without remat, matrix products and attention are kept: the rest costs less to compute again than to keep
        policy = None if remat else PRODUCTS_AND_ATTENTION
        tapped: list[Array] = []
        for group in layer_groups(self.config):
            graphs = [parts[stack.name][0] for stack in group.stacks]
            scanned = group.repeats > 1
            layer = jax.checkpoint(one_layer, static_argnums=0, prevent_cse=not scanned, policy=policy)

            def period(carry, per_layer, graphs=graphs, layer=layer, lent=lent):
                x, caches, routed = carry
                after, taps = [], []
                for graph, cache_of, (weights, data, number) in zip(graphs, caches, per_layer, strict=True):
                    x, lent, left, sums = layer(graph, x, lent, cache_of, weights, data, number)
                    after.append(left)
                    taps += [] if tap is None else [tap(x)]
                    routed = routed + sums[0] if sums else routed
                return (x, tuple(after), routed), (lent, taps)

            names = [stack.name for stack in group.stacks]
            numbers = jnp.arange(group.repeats, dtype=jnp.int32)
            per_layer = tuple(
                (parts[s.name][1], jax.tree.map(lambda a, s=s: a[jnp.array(s.layers)], data), numbers)
                for s in group.stacks
            )
            carry = (x, tuple(caches[name] for name in names), routed)
            if scanned:
                # nothing is lent there: the last layer of its kind lends, and is alone of its kind
                def step(carry, of_layer, period=period):
                    carry, (_, taps) = period(carry, of_layer)
                    return carry, taps

                (x, after, routed), taps = lax.scan(step, carry, per_layer)
                # one layer of the period after the other, repeat after repeat
                tapped += [jnp.stack(taps, axis=1).reshape(-1, *taps[0].shape[1:])] if taps else []
            else:
                (x, after, routed), (lent, taps) = period(carry, jax.tree.map(lambda a: a[0], per_layer))
                tapped += [jnp.stack(taps)] if taps else []
            caches |= dict(zip(names, after, strict=True))
        left = None if kept is None else tuple(caches.values())
        return _Ran(x, left, routed, jnp.concatenate(tapped) if tapped else None)

    def _run_apart(
        self, apart: tuple[nnx.State, ...], x: Array, context: Context, data: LayerData, kept: Cache, slot: Array
    ) -> tuple[Array, Cache]:
        """The layers one after the other, each with parameters and a cache of its own: XLA copies neither.

        In a scan it copies both at every step, which for a few tokens costs as much as their products.
        """
        graphs = {n: nnx.graphdef(self.stack(stack.name)) for stack in stacks(self.config) for n in stack.layers}
        lent: dict[str, tuple[Array, Array]] = {}
        left = []
        for number, (weights, own) in enumerate(zip(apart, kept, strict=True)):
            memory = Memory(own, None, slot)
            here = context._replace(lent=lent, routing=[])
            x = nnx.merge(graphs[number], weights)(x, here, jax.tree.map(lambda a, n=number: a[n], data), memory)
            lent = lent | memory.lent
            left.append(memory.kept)
        return x, tuple(left)

    def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """``cap(scale * h W^T)`` in float32 at least: the scores of every token of the vocabulary.

        Args:
          hidden: what ``hidden`` returns, or any rows of it.
        """
        return self._logits(hidden, None)

    def _logits(self, hidden: Float[Array, "*n D"], mesh: Mesh | None) -> Float[Array, "*n V"]:
        logical = mesh_here(mesh, self.mesh)
        if logical is not None and explicit(logical):
            rows = jax.typeof(hidden).sharding.spec[:-1]
            return with_auto_axes(self, logical, Decoder.logits, (hidden,), PartitionSpec(*rows, None))
        return self.logit_transform(matmul(hidden, self.unembedding).astype(accumulate(hidden.dtype)))

    def next_logits(self, hidden: Float[Array, "B D"], *, mesh: Mesh | None = None) -> Float[Array, "B V"]:
        """``logits`` of one state of each row, where the unembedding stays sharded.

        Args:
          hidden: of the last token of each row, from ``prefill`` or ``extend``.
          mesh: as for these.
        """
        logical = self._decoding_mesh(mesh)
        if logical is None:
            return self.logits(hidden[:, None])[:, 0]  # as of one token a row, see ``layers.matmul``
        found = products(hidden, self.unembedding, logical)
        return self.logit_transform(found.astype(accumulate(hidden.dtype)))

    def logit_transform(self, products: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Elementwise, from ``h W^T`` to the logits: the family's scale and soft-cap."""
        return from_products(products, self.config.logit_scale, self.config.logit_softcap)


def layer_by_layer(config: DecoderConfig, of_stacks: Sequence[Any]) -> tuple[Any, ...]:
    """From the arrays of each stack, layers first (parameters, a cache), to those of each layer, in order."""
    found = {
        number: jax.tree.map(lambda a, i=i: a[i], of_stack)
        for stack, of_stack in zip(stacks(config), of_stacks, strict=True)
        for i, number in enumerate(stack.layers)
    }
    return tuple(found[number] for number in sorted(found))


def cache_stacked(config: DecoderConfig, apart: Cache) -> Cache:
    """The cache that ``layer_by_layer`` took apart."""
    return tuple(
        jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *(apart[number] for number in stack.layers))
        for stack in stacks(config)
    )


class _Ran(NamedTuple):
    """What the layers leave."""

    stream: Float[Array, "B T D"]
    cache: Cache | None
    routed: Array | None
    tapped: Array | None


def _stacked_layers(config: DecoderConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> Any:
    """The layers of each stack as one module with a leading axis; by their first layer where there are several."""

    def stacked(stack: Stack) -> Layer:
        make = nnx.vmap(lambda rngs: Layer(config, stack.kind, rngs=rngs, dtype=dtype), in_axes=0, out_axes=0)
        return nnx.split_rngs(splits=len(stack.layers))(make)(rngs)

    modules = {stack.name: stacked(stack) for stack in stacks(config)}
    return modules[ROOT] if ROOT in modules else nnx.Dict({str(s.layers[0]): modules[s.name] for s in stacks(config)})


def layer_data(config: DecoderConfig) -> LayerData:
    """What differs from layer to layer besides the parameters, of all layers."""
    return LayerData(
        window=jnp.array([w or NO_WINDOW for w in config.windows], jnp.int32),
        local=jnp.array([w is not None for w in config.windows], jnp.int32),
        rotated=jnp.array(config.rotated or (True,) * config.num_layers, jnp.int32),
    )


def packs_prompts(config: DecoderConfig) -> bool:
    """Whether prompts may lie end to end in a row and each still leave a cache: no layer keeps a state."""
    kept = jax.eval_shape(lambda: empty_cache(config, 1, 1, jnp.dtype(jnp.float32)))
    return all(of_stack is None or isinstance(of_stack, cache.KeysValues) for of_stack in kept)


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """What every stack keeps of texts before they begin."""

    def of(stack: Stack) -> Any:
        one = MIXERS[stack.kind.mixer].empty(config.of_kind(stack.kind), rows, slots, dtype)
        return jax.tree.map(lambda a: jnp.zeros((len(stack.layers), *a.shape), a.dtype), one)

    return tuple(of(stack) for stack in stacks(config))


def _used(lengths: Int[Array, "B T"]) -> Int[Array, ""]:
    """How many tokens there are up to the last that is no padding, through all rows.

    >>> _used(jnp.array([[2, 2, 0], [1, 0, 0]])).tolist()
    4
    """
    ends = jnp.arange(1, lengths.size + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(lengths.reshape(-1) > 0, ends, 0))


def _per_token(lengths: Int[Array, " B"] | None, like: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
    """A number of each row, at each of its tokens."""
    return None if lengths is None else jnp.broadcast_to(lengths[:, None], like.shape)


def parameter_count(config: DecoderConfig) -> int:
    """Number of parameters of a decoder, tied matrices counted once; nothing is allocated."""
    return sum(math.prod(leaf.shape) for leaf in abstract_parameters(config).values())


def abstract_decoder(config: DecoderConfig, **options: Any) -> Decoder:
    """The decoder with shapes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))


def abstract_parameters(config: DecoderConfig, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by its dotted name (``layers.self_attn.q_proj.weight``)."""
    return named_parameters(abstract_decoder(config, **options))


def named_parameters(model: nnx.Module) -> dict[str, Any]:
    """The parameters by dotted name, layers stacked on the leading axis."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}
