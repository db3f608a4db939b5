"""The head score: equal to the inner products of true unembedding gradients, whatever the chunk and the packing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ches_jax.distributed.mesh import ROW_AXES, LogicalMesh, make_mesh
from ches_jax.models.sharding import partition_spec
from ches_jax.models.vocabulary import TABLE
from ches_jax.plan.compiled_text import collectives
from ches_jax.scores import unembedding_gradients
from ches_jax.scores.formulas import ches
from ches_jax.scores.unembedding_gradients import (
    ches_products,
    head_products,
    item_tiles,
    pair_contributions,
    token_gram,
)

V, D = 13, 5
SEGMENT = jnp.array([[0, 1, 1, 2, 2, 2, 6], [1, 1, 2, 4, 5, 5, 5]])  # two rows, room for two pairs; 6 is padding
ITEM, PREFERRED = jnp.array([[0, 0, 0, 3, 3, 3]] * 2), jnp.array([[1, 1, 0, 1, 1, 0]] * 2)


def softcap(x):
    return 3.0 * jnp.tanh(1.7 * x / 3.0)


@pytest.fixture
def case(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, 7, D), jnp.float64)
    target = jax.random.randint(keys[1], (2, 7), 0, V)
    return hidden, target, jax.random.normal(keys[2], (V, D), jnp.float64)


def unembedding_gradient(hidden, target, w, chosen, transform):
    """d/dW of the summed log-probabilities of the predictions named in ``chosen``, by autodiff."""

    def logp(w):
        log_pi = jax.nn.log_softmax(transform(hidden @ w.T), axis=-1)
        return jnp.where(chosen, jnp.take_along_axis(log_pi, target[:, None], 1)[:, 0], 0.0).sum()

    return jax.grad(logp)(w)


@pytest.mark.parametrize("transform", [lambda x: x, softcap], ids=["plain", "softcap"])
@pytest.mark.parametrize(("chunk", "tile"), [(4, 64), (13, 2), (100, 3)])
def test_the_head_score_is_the_inner_product_of_unembedding_gradients(case, transform, chunk, tile, monkeypatch):
    monkeypatch.setattr(unembedding_gradients, "TILE", tile)
    hidden, target, w = case
    products = jax.jit(lambda *a: head_products(*a, unembedding=w, transform=transform, chunk=chunk))(
        hidden, target, SEGMENT, ITEM, PREFERRED
    )
    for row, pair in [(0, 0), (1, 0), (1, 1)]:
        first = 3 * pair
        out = pair_contributions(products[row], SEGMENT[row], first, first + 1, first + 2)
        shared, chosen, rejected = (SEGMENT[row] == first + i for i in range(3))
        a = [unembedding_gradient(hidden[row], target[row], w, shared | s, transform) for s in (chosen, rejected)]
        np.testing.assert_allclose(out.inner, (a[0] * a[1]).sum(), rtol=1e-12)
        np.testing.assert_allclose(out.sqnorm_chosen, (a[0] ** 2).sum(), rtol=1e-12)
        np.testing.assert_allclose(out.score, (a[0] * (a[1] - a[0])).sum(), rtol=1e-11)
        np.testing.assert_allclose(out.shares[shared | chosen].sum(), out.score, rtol=1e-11)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("text", ["fsdp=4,tensor=2", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)])
def test_a_vocabulary_in_parts_gives_the_same_products(x64, text, together, monkeypatch):
    """Parts that their devices do not divide, too. Pieces of W travel, once for the rows of a group, and no states."""
    monkeypatch.setattr(unembedding_gradients, "COEFFICIENTS", together * 7**2)
    keys = jax.random.split(jax.random.key(3), 3)
    rows, count, width, words = 8, 7, 8, 10
    h, w = jax.random.normal(keys[0], (rows, count, width)), jax.random.normal(keys[1], (words, width))
    target = jax.random.randint(keys[2], (rows, count), 0, words)
    segment, item, preferred = (jnp.tile(a, (4, 1)) for a in (SEGMENT, ITEM, PREFERRED))
    arrays = h, target, segment, item, preferred
    logical = LogicalMesh.of(make_mesh(text))
    on_mesh = jax.device_put(w, NamedSharding(logical.mesh, partition_spec(TABLE, w.shape, logical)))

    def products(w, h, target, segment, item, preferred, logical=None):
        return head_products(h, target, segment, item, preferred, w, softcap, 4, logical)

    run = jax.jit(partial(products, logical=logical)).lower(on_mesh, *arrays).compile()
    expected = jax.jit(products)(w, *arrays)
    np.testing.assert_allclose(run(on_mesh, *arrays), expected, rtol=1e-12, atol=1e-12)
    found = collectives(str(run.as_text()))
    largest = {kind: max(c.bytes for c in found if c.kind == kind) for kind in {c.kind for c in found}}
    held, size = w.nbytes // logical.size("fsdp", "tensor"), w.itemsize
    # a chunk of W, and its part once, turned; the states of a device's row would be twice as much
    assert largest["all-gather"] == 4 * width * size and largest.pop("all-to-all") <= 2 * held
    # over tensor sums are added up, of a device's own rows
    assert largest.pop("all-reduce") == together * count**2 * size
    assert set(largest) == {"all-gather"}
    of_device, pieces = rows // logical.size(*ROW_AXES), [c for c in found if c.bytes == largest["all-gather"]]
    per_walk = -(-words // logical.size("tensor")) // 4 + 1
    assert sum(c.times for c in pieces if c.kind == "all-gather") == 2 * of_device // together * per_walk


def whole_gram(hidden, target, w, **options):
    """All coefficients of one row, as a single tile."""
    visits = jnp.zeros((2, 1), jnp.int32)
    return token_gram(hidden, target, visits, jnp.int32(1), w, tile=len(target), **options)[0]


def test_the_gram_is_symmetric_and_its_coefficients_lie_between_minus_two_and_two(case):
    hidden, target, w = case
    alpha = whole_gram(hidden[0] * 3, target[0], w, chunk=5)
    np.testing.assert_allclose(alpha, alpha.T, rtol=1e-13)
    assert float(jnp.abs(alpha).max()) < 2


def test_coefficients_keep_their_digits_where_the_model_is_sure():
    w = jnp.array([[1.0], [0.0]])
    alpha = whole_gram(jnp.full((1, 1), 40.0), jnp.zeros(1, jnp.int32), w)
    expected = 2 * float(np.exp(-80.0))  # q^2 + q^2 with q = e^-40, although 1 - pi(y) rounds to 0 in float32
    np.testing.assert_allclose(float(alpha[0, 0]), expected, rtol=1e-5)


def test_only_tiles_that_a_score_needs_are_visited():
    item = jnp.array([0, 0, 0, 1, 1, 2, 2, 2])
    visits, count = item_tiles(item, jnp.ones(8, jnp.int32), 2)
    assert visits[:, : int(count)].T.tolist() == [[0, 0], [0, 1], [1, 1], [1, 2], [2, 2], [2, 3], [3, 3]]
    # one item whose last four predictions belong to responses that are never chosen: not with each other
    visits, count = item_tiles(jnp.zeros(8, jnp.int32), jnp.array([1, 1, 1, 0, 0, 0, 0, 0]), 2)
    assert visits[:, : int(count)].T.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 1], [1, 2], [1, 3]]


def test_ches_by_token_adds_up_to_the_definition(case):
    hidden, _, _ = case
    products = ches_products(hidden, SEGMENT, 6)
    out = pair_contributions(products[0], SEGMENT[0], 0, 1, 2)
    s_plus, s_minus = hidden[0, :3].sum(0), hidden[0, jnp.array([0, 3, 4, 5])].sum(0)
    np.testing.assert_allclose(out.score, ches(s_plus @ s_minus, s_plus @ s_plus), rtol=1e-12)
    np.testing.assert_allclose(out.shares[:3].sum(), out.score, rtol=1e-12)
    np.testing.assert_allclose(out.with_chosen[:6], hidden[0, :6] @ s_plus, rtol=1e-12)
    assert float(out.shares[6]) == float(out.with_chosen[6]) == 0
    assert pair_contributions(products[0], SEGMENT[0], 3, 4, 5).score == 0  # no pair lies there


def test_bfloat16_states_are_accumulated_in_float32():
    h = jnp.ones((1, 3, D), jnp.bfloat16)
    segment = jnp.array([[0, 1, 2]])
    out = head_products(h, segment, segment, ITEM[:1, :3], PREFERRED[:1, :3], jnp.ones((V, D), jnp.bfloat16))
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()
