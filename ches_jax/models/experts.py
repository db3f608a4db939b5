r"""Routed experts: each token goes through the few experts that its router chooses, and no token is ever dropped.

For a token x, experts e with matrices of their own, and the set C of the experts chosen for it:

.. math:: y = \sum_{e \in C} w_e\, E_e(x), \qquad E_e(x) = D_e\,(\mathrm{act}(G_e x) \odot U_e x)

Tokens are sorted by expert, so that an expert's tokens are rows next to each other, and a *grouped product* multiplies
each run of rows by the matrix of its expert. What a token gets does not depend on its neighbours: there is no capacity.

On a mesh with an ``expert`` axis each device holds some of the experts, computes those for the tokens of all devices of
the axis, and the parts are added up.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ches_jax.distributed.mesh import LogicalMesh
from ches_jax.models.attention.dense import KEPT
from ches_jax.models.config import DecoderConfig, ExpertsConfig
from ches_jax.models.layers import ACTIVATIONS, Context, Linear, Mlp, Norm, unit_rms
from ches_jax.models.platform import platform
from ches_jax.models.precision import accumulate, matmul_precision
from ches_jax.models.sharding import expert_axes

FEW_ROWS = 256
"""Rows of which a TPU is given all products with all matrices: reading these takes longer. For its grouped product the
matrices are turned, and in a loop over new tokens the compiler keeps a turned copy of all of them."""
ROWS_BY_COLUMNS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


class Choice(NamedTuple):
    """The experts of each token."""

    expert: Int[Array, "T k"]
    weight: Float[Array, "T k"]
    scores: Float[Array, "T E"]
    """Of all experts, before any is chosen: what the load-balancing loss takes."""


def grouped_matmul(
    x: Float[Array, "M I"], weight: Float[Array, "E O I"], sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """Rows times the matrix of their group: ``x[i] @ weight[g(i)].T`` in the dtype of x.

    The groups are runs of ``sizes`` rows one after the other; rows after the last group give zeros. Differentiable in
    both modes.

    >>> x, w = jnp.ones((4, 2)), jnp.arange(2.0)[:, None, None] * jnp.ones((2, 3, 2))
    >>> grouped_matmul(x, w, jnp.array([1, 2])).tolist()
    [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]
    """
    if platform() == "cpu":
        product = _one_group_at_a_time
    else:
        product = _every_group if platform() == "tpu" and len(x) <= FEW_ROWS else _ragged
    return product(x, weight.astype(x.dtype), sizes)


def _ragged(x: Array, weight: Array, sizes: Array) -> Array:
    """One grouped product of the backend."""
    return lax.ragged_dot_general(x, weight, sizes, ROWS_BY_COLUMNS, precision=matmul_precision(x.dtype))


def _every_group(x: Array, weight: Array, sizes: Array) -> Array:
    """All rows times all matrices, of which each row keeps one product."""
    products = lax.dot_general(x, weight, (((1,), (2,)), ((), ())), precision=matmul_precision(x.dtype))
    row, ends = jnp.arange(len(x), dtype=sizes.dtype)[:, None], jnp.cumsum(sizes)[None]
    own = (row >= ends - sizes[None]) & (row < ends)
    return jnp.where(own[..., None], products, jnp.zeros_like(products)).sum(1)


def _one_group_at_a_time(x: Array, weight: Array, sizes: Array) -> Array:
    """A product for each group, of its rows rounded up to one of a few numbers; each number is compiled once.

    XLA on a CPU multiplies every row by the matrix of every group and throws most of that away.
    """
    rows = x.shape[0]
    # halves of halves, down to half of an even share
    lengths = sorted({-(-rows >> n) for n in range(len(weight).bit_length() + 1)})
    ends = jnp.cumsum(sizes)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(out, group):
        matrix, start, end = group

        def of_length(length: int):
            first = jnp.minimum(start, rows - length)
            here = lax.dynamic_slice_in_dim(x, first, length)
            row = first + jnp.arange(length, dtype=first.dtype)
            inside = ((row >= start) & (row < end))[:, None]
            product = lax.dot_general(here, matrix, (((1,), (1,)), ((), ())), precision=matmul_precision(x.dtype))
            before = lax.dynamic_slice_in_dim(out, first, length)
            after = before + jnp.where(inside, product, jnp.zeros_like(product))
            return lax.dynamic_update_slice_in_dim(out, after, first, 0)

        bucket = jnp.sum(jnp.asarray(lengths, sizes.dtype) < end - start)
        return lax.switch(bucket, [partial(of_length, length) for length in lengths]), None

    start = jnp.zeros((rows, weight.shape[1]), x.dtype)
    return lax.scan(one, start, (weight, ends - sizes, ends))[0]


class Router(nnx.Module):
    """Which experts a token goes through, and with which weights; computed in float32 at least.

    An adapter is added to the matrix, which is small, before it is multiplied.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Draws the matrix as ``Linear`` does."""
        assert config.experts is not None
        self.config = e = config.experts
        init = jax.random.normal(rngs.params(), (e.count, config.width), jnp.float32) * 0.02
        self.weight = nnx.Param(init.astype(dtype))
        self.bias = nnx.Param(jnp.zeros((e.count,), dtype)) if e.router_bias else None
        self.scale = nnx.Param(jnp.ones((config.width,), dtype)) if e.scaled_router else None
        self.expert_scale = nnx.Param(jnp.ones((e.count,), dtype)) if e.scaled_router else None
        self.eps = config.norm_eps
        self.correction = nnx.Param(jnp.zeros((e.count,), dtype)) if e.correction else None
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 1.0

    def __call__(self, x: Float[Array, "T D"]) -> Choice:
        """The choice for each token."""
        e, acc = self.config, accumulate(x.dtype)
        if self.scale is not None:
            x = unit_rms(x, self.eps) * (self.scale[...] * x.shape[-1] ** -0.5).astype(x.dtype)[None]
        contract = (((1,), (1,)), ((), ()))
        weight = self.weight[...].astype(acc)
        if self.lora_a is not None and self.lora_b is not None:
            low = jnp.matmul(self.lora_b[...], self.lora_a[...], precision=lax.Precision.HIGHEST)
            weight = weight + (self.lora_scale * low).astype(acc)
        logits = lax.dot_general(x.astype(acc), weight, contract, precision=lax.Precision.HIGHEST)
        logits = logits if self.bias is None else logits + self.bias[...].astype(acc)[None]
        scores = jax.nn.softmax(logits, axis=-1) if e.score == "softmax" else jax.nn.sigmoid(logits)
        merit = scores if self.correction is None else scores + self.correction[...].astype(acc)[None]
        chosen = lax.top_k(lax.stop_gradient(_in_best_groups(merit, e)), e.per_token)[1]
        weight = jnp.take_along_axis(scores, chosen, axis=-1)
        if e.renormalise:
            weight = weight / weight.sum(-1, keepdims=True)
        if self.expert_scale is not None:
            weight = weight * jnp.take(self.expert_scale[...].astype(acc), chosen)
        return Choice(chosen, weight * e.scale if e.scale != 1 else weight, scores)


def _in_best_groups(merit: Float[Array, "T E"], e: ExpertsConfig) -> Float[Array, "T E"]:
    """The merit of the experts in the best groups, and minus infinity elsewhere."""
    if e.groups == 1:
        return merit
    by_group = merit.reshape(len(merit), e.groups, -1)
    of_group = lax.top_k(by_group, 2)[0].sum(-1)
    best = lax.top_k(of_group, e.groups_kept)[1]
    kept = (best[:, :, None] == jnp.arange(e.groups, dtype=best.dtype)[None, None]).any(1)
    return jnp.where(kept[..., None], by_group, -jnp.inf).reshape(merit.shape)


class Grouped(nnx.Module):
    """A matrix for each expert (and a bias), as ``Linear`` is one for all tokens; adapters go beside each."""

    def __init__(self, count: int, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Draws the matrices as ``Linear`` does."""
        init = jax.random.normal(rngs.params(), (count, outputs, inputs), jnp.float32) * 0.02
        self.weight = nnx.Param(init.astype(dtype))
        self.bias = nnx.Param(jnp.zeros((count, outputs), dtype)) if bias else None
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 1.0

    def __call__(
        self, x: Float[Array, "M I"], sizes: Int[Array, " E"], expert: Int[Array, " M"]
    ) -> Float[Array, "M O"]:
        """Applies to each row the map of its expert; the rows of one expert follow each other."""
        y = grouped_matmul(x, self.weight[...], sizes)
        if self.lora_a is not None and self.lora_b is not None:
            low = grouped_matmul(x, self.lora_a[...], sizes)
            y = y + grouped_matmul(low, self.lora_scale * self.lora_b[...], sizes)
        y = y if self.bias is None else y + jnp.take(self.bias[...], expert, axis=0).astype(y.dtype)
        return checkpoint_name(y, KEPT)


class Experts(nnx.Module):
    """The matrices of all experts."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes them."""
        assert config.experts is not None
        e = config.experts
        options = {"bias": e.bias, "rngs": rngs, "dtype": dtype}
        self.gate_proj = Grouped(e.count, config.width, e.width, **options)
        self.up_proj = Grouped(e.count, config.width, e.width, **options)
        self.down_proj = Grouped(e.count, e.width, config.width, **options)
        self.activation, self.clamped = config.activation, config.clamped_gate

    def __call__(
        self, x: Float[Array, "M D"], sizes: Int[Array, " E"], expert: Int[Array, " M"]
    ) -> Float[Array, "M D"]:
        """Rows sorted by expert through their experts."""
        gate, up = self.gate_proj(x, sizes, expert), self.up_proj(x, sizes, expert)
        if self.clamped is None:
            inner = ACTIVATIONS[self.activation](gate) * up
        else:
            limit = jnp.asarray(self.clamped.limit, x.dtype)
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            inner = (up + 1) * gate * jax.nn.sigmoid(gate * jnp.asarray(self.clamped.alpha, x.dtype))
        return self.down_proj(inner, sizes, expert)


class Routed(nnx.Module):
    """The MLP of a layer as routed experts, with one expert that every token goes through where the family has it."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes router, experts and the shared expert."""
        assert config.experts is not None
        self.config = e = config.experts
        self.router = Router(config, rngs=rngs, dtype=dtype)
        self.experts = Experts(config, rngs=rngs, dtype=dtype)
        self.shared = (
            None if e.shared_width is None else Mlp(replace(config, mlp_width=e.shared_width), rngs=rngs, dtype=dtype)
        )
        self.shared_gate = Linear(config.width, 1, bias=False, rngs=rngs, dtype=dtype) if e.shared_gate else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, before: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """What the chosen experts give, and the shared one."""
        choice = self.router(x.reshape(-1, x.shape[-1]))
        if context.counted is not None and context.routing is not None:
            context.routing.append(routing_sums(choice, context.counted.reshape(-1)))
        routed = through_experts(self.experts, x, choice, self.config, context.logical)
        if self.shared is None:
            return routed
        shared = self.shared(x, context, before)
        return routed + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)


def routing_sums(choice: Choice, counted: Bool[Array, " T"]) -> Float[Array, "2 E"]:
    """How often each expert is chosen and the sum of its scores, over the tokens that count; for ``balance_loss``."""
    experts = jnp.arange(choice.scores.shape[-1], dtype=choice.expert.dtype)
    here = counted.astype(choice.scores.dtype)[:, None]
    chosen = (choice.expert[:, :, None] == experts[None, None]).any(1).astype(choice.scores.dtype)
    return jnp.stack([(lax.stop_gradient(chosen) * here).sum(0), (choice.scores * here).sum(0)])


def balance_loss(sums: Float[Array, "2 E"], tokens: Float[Array, ""]) -> Float[Array, ""]:
    r"""The load-balancing loss of Switch Transformer (arXiv:2101.03961, equation 4), as transformers adds it up.

    .. math:: E \sum_e \frac{c_e}{T} \frac{s_e}{T}

    over the T tokens of all layers, of which expert e is chosen by c and has scores that sum to s; k experts of a token
    that are chosen equally give k, the least.

    >>> float(balance_loss(jnp.array([[4.0, 4.0], [2.0, 2.0]]), jnp.array(4.0)))
    2.0
    """
    share, score = sums / tokens
    return sums.shape[-1] * jnp.sum(share * score)


class DenseAndRouted(nnx.Module):
    """A dense MLP and routed experts side by side, each with norms of its own."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes both and their norms."""
        assert config.experts is not None
        self.config = config.experts
        self.dense = Mlp(config, rngs=rngs, dtype=dtype)
        self.router = Router(config, rngs=rngs, dtype=dtype)
        self.experts = Experts(config, rngs=rngs, dtype=dtype)
        self.dense_out_norm = Norm(config.width, config, dtype=dtype)
        self.routed_norm = Norm(config.width, config, dtype=dtype)
        self.routed_out_norm = Norm(config.width, config, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, before: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The sum of both; router and experts take the stream, not its norm before the dense MLP."""
        choice = self.router(before.reshape(-1, before.shape[-1]))
        routed = through_experts(self.experts, self.routed_norm(before), choice, self.config, context.logical)
        return self.dense_out_norm(self.dense(x, context, before)) + self.routed_out_norm(routed)


def through_experts(
    experts: Experts, x: Float[Array, "B T D"], choice: Choice, e: ExpertsConfig, logical: LogicalMesh | None
) -> Float[Array, "B T D"]:
    """The weighted sum of what each token's experts give, wherever on a mesh they lie."""
    expert, weight = (a.reshape(*x.shape[:2], e.per_token) for a in (choice.expert, choice.weight))
    if logical is None:
        return _sum_of(experts, x, expert, weight, e.weighs_inputs, jnp.int32(0))
    holders = expert_axes(e.count, logical)
    rows = logical.rows(x.shape[0])
    over = tuple(name for axis in holders for name in logical.names(axis))
    gathered = logical.names("expert") if "expert" in holders and rows != PartitionSpec(None) else ()
    summed = tuple(name for name in over if name not in gathered)
    graph, state = nnx.split(experts)

    def on_device(state, x, expert, weight):
        first = lax.axis_index(over) * (e.count // logical.size(*holders)) if over else 0
        if gathered:
            x, expert, weight = (lax.all_gather(a, gathered, axis=0, tiled=True) for a in (x, expert, weight))
        y = _sum_of(nnx.merge(graph, state), x, expert, weight, e.weighs_inputs, jnp.int32(first))
        y = lax.psum(y, summed) if summed else y
        return lax.psum_scatter(y, gathered, scatter_dimension=0, tiled=True) if gathered else y

    by_row = logical.spec(rows)
    run = jax.shard_map(
        on_device,
        mesh=logical.current,
        in_specs=(logical.spec(PartitionSpec(holders or None)), by_row, by_row, by_row),
        out_specs=by_row,
        check_vma=False,
    )
    return run(state, x, expert, weight)


def _sum_of(
    experts: Experts,
    x: Float[Array, "B T D"],
    expert: Int[Array, "B T k"],
    weight: Float[Array, "B T k"],
    weighs_inputs: bool,
    first: Int[Array, ""],
) -> Float[Array, "B T D"]:
    """The part of the sum that these experts give: those from ``first`` on, in the order of their matrices."""
    count, k = experts.gate_proj.weight.shape[0], expert.shape[-1]
    number = expert.reshape(-1) - first
    number = jnp.where((number >= 0) & (number < count), number, count)  # those of other devices come last
    order = jnp.argsort(number, stable=True)
    # the inverse permutation; a second sort would be most of what a TPU's compiler does for a routed layer
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
    number = number[order]
    sizes = jnp.bincount(number, length=count).astype(jnp.int32)
    rows = jnp.take(x.reshape(-1, x.shape[-1]), order // k, axis=0)
    if weighs_inputs:
        rows = rows * jnp.take(weight.reshape(-1), order)[:, None].astype(rows.dtype)
    y = experts(rows, sizes, jnp.minimum(number, count - 1))
    y = jnp.where((number < count)[:, None], y, jnp.zeros_like(y))
    # taken as it is and made wider in the sum: wider before, k copies of every token would be held twice as large
    y = jnp.take(y, place, axis=0).reshape(-1, k, x.shape[-1]).astype(accumulate(x.dtype))
    if not weighs_inputs:
        y = y * weight.reshape(-1, k, 1).astype(y.dtype)
    return y.sum(1).astype(x.dtype).reshape(x.shape)
