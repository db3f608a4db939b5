r"""Gradient entanglement of pairs: how the gradients of ln pi(y+|x) and ln pi(y-|x) lie to each other.

.. math:: \|g_+\|, \quad \|g_-\|, \quad \langle g_+, g_- \rangle, \quad
  \cos = \frac{\langle g_+, g_- \rangle}{\|g_+\| \|g_-\|}

A step along the gradient of a loss moves the log-probabilities by :math:`d_+ \|g_+\|^2 - d_- \langle g_+, g_- \rangle`
and :math:`d_+ \langle g_+, g_- \rangle - d_- \|g_-\|^2`, with the loss's incentives d. So the chosen response rises and
the rejected one falls while the ratio :math:`d_+ / d_-` (1 for DPO) lies inside the band

.. math:: \frac{\langle g_+, g_- \rangle}{\|g_+\|^2} < \frac{d_+}{d_-} < \frac{\|g_-\|^2}{\langle g_+, g_- \rangle},

and beyond it both move the same way. Four estimators, by what is differentiated; for each pair a forward pass and

    head       the unembedding matrix alone, counted apart where it is tied: two backward passes of the head
    lora       fresh adapters of a rank, drawn by a seed: two backward passes, gradients as small as the adapters
    full       every parameter: two backward passes, memory for two gradients beside the weights
    projected  every parameter, through K random directions: no backward pass, K forward-mode passes for all pairs of a
               batch; an inner product has a standard error of about :math:`\|g_+\|\|g_-\| \sqrt{(1 + \cos^2) / K}`

Where every device has all weights, each takes pairs of its own. Where weights are sharded, all devices compute each
pair together, and its gradients are sharded as the weights are.

References:
  Yuan et al., A Common Pitfall of Margin-based Language Model Alignment (https://arxiv.org/abs/2410.13828); the band as
  in Disentangled Preference Optimization (https://arxiv.org/abs/2604.18239).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ches_jax.data.packing import PackedBatch, doubled, empty_batch, pack, packed_length
from ches_jax.distributed.mesh import ROWS, put_own_rows, put_replicated, row_shards, weights_are_whole
from ches_jax.models.adapters.lora import ALL_LINEAR, adapted, adapter_shapes, initial_adapters, make_spec
from ches_jax.models.attention.choose import with_gradient
from ches_jax.models.attention.dense import Attend, query_chunked
from ches_jax.models.attention.mask import Visibility
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.models.logprobs import Head, forward_token_logps, token_logps
from ches_jax.models.precision import accumulate, inner
from ches_jax.models.segment_sums import segment_sums
from ches_jax.models.sharding import placement
from ches_jax.scores import formulas
from ches_jax.scores.config import GradientEstimator
from ches_jax.types import Eos, TokenPair

SHORTEST = 64
"""Positions of the row of a short pair; longer ones take doubled rows, so that few programs are compiled."""
PACKED_ROW = 512
"""Positions of the rows that projected gradients are taken of, where there are so many."""

HEAD = "lm_head.weight"
"""The name of the unembedding in a tree, tied or not: it lies as this parameter does."""

Tree = dict[str, Array]


class Gram(NamedTuple):
    """Of N pairs the squared norms and the inner product of the two gradients, float64."""

    chosen: np.ndarray
    rejected: np.ndarray
    inner: np.ndarray


def _states(model: Decoder, rows: PackedBatch, attend: Attend, mesh: Mesh | None) -> Float[Array, "B M D"]:
    seen = Visibility(rows.context_start, rows.context_end, rows.own_start)
    hidden = model.hidden(rows.tokens, rows.positions, seen, rows.lengths, attend=attend, mesh=mesh)
    return jnp.take_along_axis(hidden, rows.source[..., None], axis=1)


def _segments(
    model: Decoder,
    weight: Array,
    states: Array,
    rows: PackedBatch,
    per_token: Callable[..., Array],
    mesh: Mesh | None,
) -> Float[Array, "B S"]:
    """Summed log-probabilities of every segment."""
    head = Head(model.config.logit_scale, model.config.logit_softcap, logical=model.auto_mesh(mesh))
    return segment_sums(per_token(states, weight, rows.target, head)[..., None], rows.segment, rows.last.shape[1])[
        ..., 0
    ]


def _of_the_pair(sums: Float[Array, "1 S"]) -> Float[Array, " 2"]:
    """Chosen and rejected of a row that holds one pair: what both share, and the part of each."""
    return sums[0, 0] + sums[0, 1:3]


class Gradients:
    """``gradients(pairs)``: the Gram matrix of each pair's two gradients; counts what it cost."""

    def __init__(self, model: Decoder, mesh: Mesh, estimator: GradientEstimator, eos: Eos):
        """Takes a model that lies on ``mesh`` as ``sharding.placement`` says (or anywhere, for a data-only mesh).

        Its parameters are differentiated in float32 at least.
        """
        wide = accumulate(model.dtype)
        self._mesh = mesh
        self._whole = weights_are_whole(mesh)
        self._rows = row_shards(mesh) if self._whole else 1
        """Rows computed at a time."""
        self.estimator = estimator
        self.eos: Eos = eos
        rope = model.config.rope
        self._threshold = rope.length_threshold if rope else None
        self.seconds, self.pairs = 0.0, 0
        abstract = abstract_decoder(model.config, dtype=model.dtype, param_dtype=wide)
        params = {name: value.astype(wide) for name, value in named_parameters(model).items()}
        frozen: Tree = {}
        if estimator.name == "head":
            params, frozen = {HEAD: model.unembedding.astype(wide)}, params
        elif estimator.name == "lora":
            rank = estimator.size
            abstract = adapted(abstract, make_spec(rank, 2.0 * rank, ALL_LINEAR, model.config), wide)
            frozen = params
            params = put_replicated(initial_adapters(adapter_shapes(abstract), estimator.seed), mesh)
        replicated = NamedSharding(mesh, PartitionSpec())
        if self._whole:
            params, frozen = jax.device_put((params, frozen), replicated)
        self._params, self._frozen = params, frozen
        inside = None if self._whole else mesh
        attend = with_gradient(model.config, str(model.dtype))
        gram = _gram_of_a_pair(abstract, estimator.name, attend, inside)
        projected = _projections(abstract, estimator, inside)
        if self._whole:
            whole = PartitionSpec()
            on_each = partial(jax.shard_map, mesh=mesh, check_vma=False)
            gram = on_each(gram, in_specs=(whole, whole, ROWS), out_specs=ROWS)
            projected = on_each(projected, in_specs=(whole, ROWS), out_specs=PartitionSpec(None, *ROWS))
        self._gram = jax.jit(gram, out_shardings=replicated)
        self._projected = jax.jit(projected, out_shardings=replicated)

    def facts(self) -> dict[str, Any]:
        """What it cost so far, for ``run.json``."""
        each = {"forward": 1, "backward": 2}
        if self.estimator.name == "projected":
            each = {"forward_mode": self.estimator.size}
        return {
            "estimator": str(self.estimator),
            "parameters": sum(int(v.size) for v in self._params.values()),
            "passes_of_a_pair": each,
            "pairs": self.pairs,
            "seconds": round(self.seconds, 3),
        }

    def __call__(self, pairs: Sequence[TokenPair]) -> Gram:
        """Of scorable pairs, in their order."""
        started = time.perf_counter()
        found = self._by_projection(pairs) if self.estimator.name == "projected" else self._by_pair(pairs)
        self.seconds += time.perf_counter() - started
        self.pairs += len(pairs)
        return Gram(*found.T)

    def _on_mesh(self, rows: PackedBatch) -> PackedBatch:
        """Each device's own rows, or the same ones on every device."""
        return put_own_rows(rows, self._mesh) if self._whole else put_replicated(rows, self._mesh)

    def _by_pair(self, pairs: Sequence[TokenPair]) -> np.ndarray:
        out = np.zeros((len(pairs), 3))
        for numbers, rows in self._pairs_by_row(pairs):
            out[numbers] = np.asarray(self._gram(self._params, self._frozen, self._on_mesh(rows)))[: len(numbers)]
        return out

    def _pairs_by_row(self, pairs: Sequence[TokenPair]) -> Iterator[tuple[list[int], PackedBatch]]:
        """Batches of one pair a row, with their numbers; rows of equal length together."""
        by_length: dict[int, list[tuple[int, PackedBatch]]] = {}
        for i, pair in enumerate(pairs):
            ((row, _),) = pack(
                [pair], length=SHORTEST, rows_per_batch=1, eos=self.eos, length_threshold=self._threshold
            )
            by_length.setdefault(row.tokens.shape[1], []).append((i, row))
        for length, found in sorted(by_length.items()):
            for at in range(0, len(found), self._rows):
                numbers, rows = zip(*found[at : at + self._rows], strict=True)
                padding = [empty_batch(1, length)] * (self._rows - len(rows))
                yield list(numbers), jax.tree.map(lambda *a: np.concatenate(a), *rows, *padding)

    def _by_projection(self, pairs: Sequence[TokenPair]) -> np.ndarray:
        out = np.zeros((len(pairs), 3))
        needed = sum(packed_length(pair, self._threshold) for pair in pairs)
        length = doubled(SHORTEST, min(needed, PACKED_ROW))
        batches = pack(
            pairs,
            length=length,
            rows_per_batch=self._rows,
            eos=self.eos,
            row_multiple=self._rows,
            length_threshold=self._threshold,
        )
        for rows, places in batches:
            along = np.asarray(self._projected(self._params, self._on_mesh(rows)), np.float64)
            for p in places:
                shared = along[:, p.row, p.shared]
                chosen, rejected = (shared + along[:, p.row, side] for side in (p.chosen, p.rejected))
                out[p.item] = [np.mean(chosen**2), np.mean(rejected**2), np.mean(chosen * rejected)]
        return out


def _as_the_weights(name: str, gradient: Array, mesh: Mesh | None) -> Array:
    """The gradient by a parameter (or a direction) sharded as the parameter is."""
    if mesh is None:
        return gradient
    return lax.with_sharding_constraint(gradient, placement(mesh)(name, gradient.shape))


def _gram_of_a_pair(
    abstract: Decoder, name: str, attend: Attend, mesh: Mesh | None
) -> Callable[[Tree, Tree, PackedBatch], Array]:
    """[1, 3] of the pair that a row holds: both squared norms and the inner product."""

    def logps(params: Tree, frozen: Tree, rows: PackedBatch) -> Array:
        if name == "head":
            model = with_parameters(abstract, frozen)
            states = lax.stop_gradient(_states(model, rows, attend, mesh))
            return _of_the_pair(_segments(model, params[HEAD], states, rows, token_logps, mesh))
        model = with_parameters(abstract, {**frozen, **params})
        states = _states(model, rows, attend, mesh)
        return _of_the_pair(_segments(model, model.unembedding, states, rows, token_logps, mesh))

    def gram(params: Tree, frozen: Tree, rows: PackedBatch) -> Array:
        value, back = jax.vjp(lambda p: logps(p, frozen, rows), params)

        def gradient(one: Array) -> Tree:
            return {name: _as_the_weights(name, g, mesh) for name, g in back(one)[0].items()}

        chosen, rejected = map(gradient, jnp.eye(2, dtype=value.dtype))
        return jnp.stack([inner(chosen, chosen), inner(rejected, rejected), inner(chosen, rejected)])[None]

    return gram


def _projections(
    abstract: Decoder, estimator: GradientEstimator, mesh: Mesh | None
) -> Callable[[Tree, PackedBatch], Array]:
    """[K, B, S] derivatives of all segments along K directions, each parameter of which is drawn from N(0, 1)."""

    def run(params: Tree, rows: PackedBatch) -> Array:
        def logps(p: Tree) -> Array:
            model = with_parameters(abstract, p)
            states = _states(model, rows, query_chunked, mesh)
            return _segments(model, model.unembedding, states, rows, forward_token_logps, mesh)

        def along(number: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(estimator.seed), number)
            keys = dict(zip(sorted(params), jax.random.split(key, len(params)), strict=True))
            direction = {
                n: _as_the_weights(n, jax.random.normal(keys[n], v.shape, v.dtype), mesh) for n, v in params.items()
            }
            return jax.jvp(logps, (params,), (direction,))[1]

        return lax.map(along, jnp.arange(estimator.size))

    return run


def band(gram: Gram) -> tuple[np.ndarray, np.ndarray]:
    """The ratios of incentives between which chosen rises and rejected falls; NaN: no bound (or no gradient).

    >>> low, high = band(Gram(np.array([4.0]), np.array([9.0]), np.array([2.0])))
    >>> low.tolist(), high.tolist()
    ([0.5], [4.5])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(gram.chosen > 0, gram.inner / gram.chosen, np.nan)
        high = np.where(gram.inner > 0, gram.rejected / gram.inner, np.nan)
    return low, high


def cosine(gram: Gram) -> np.ndarray:
    """Of the two gradients; NaN where one vanishes."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return formulas.cosine(gram.inner, gram.chosen, gram.rejected)
