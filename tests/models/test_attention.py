"""Every way to compute attention on packed rows against plain attention of each sequence alone, in NumPy."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.models.attention import dense
from ches_jax.models.attention.block_sparse import blocks, forward_blocks
from ches_jax.models.attention.choose import KERNELS
from ches_jax.models.attention.dense import AttentionInputs, AttentionParams
from ches_jax.models.attention.mask import KeyRanges, block_index, block_spans, key_ranges, visible, within

from .packed import Packed, packed

SIZES = [(31, 3, 40, 22), (1, 0, 1, 1), (60, 0, 17, 80), (5, 7, 0, 9), (12, 0, 90, 3), (90, 1, 11, 45), (2, 0, 30, 7)]
LENGTH = 301
"""No multiple of any tile."""
NO_WINDOW = 2**30


class Case(NamedTuple):
    """A shape, and what else a family may ask for."""

    kv: int
    group: int
    head: int
    window: int = NO_WINDOW
    softcap: float | None = None
    dtype: str = "float32"
    tolerance: float = 1e-5


CASES = [
    pytest.param(Case(1, 2, 64), id="grouped"),
    pytest.param(Case(2, 1, 128, window=40, softcap=5.0), id="window-softcap"),
    pytest.param(Case(1, 4, 32, window=17, dtype="float64", tolerance=1e-12), id="float64"),
]
PLAIN = {
    "dense": dense.dense,
    "blocks": partial(blocks, block=16),
    "query_chunked": partial(dense.query_chunked, chunk=50),
}
WAYS = PLAIN | {name: kernel.make(True) for name, kernel in KERNELS.items()}


@pytest.fixture(scope="module")
def rows() -> Packed:
    return packed(SIZES, LENGTH)


def arrays(case: Case, rows: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count, length = rows.rows.tokens.shape
    rng = np.random.default_rng(0)
    shapes = ((count, length, case.kv, case.group, case.head), *[(count, length, case.kv, case.head)] * 2)
    q, k, v = (rng.normal(size=s).astype(case.dtype) for s in shapes)
    return q, k, v


def inputs_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, ranges: KeyRanges) -> AttentionInputs:
    return AttentionInputs(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), ranges)


def alone(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, row: int, at: np.ndarray) -> np.ndarray:
    """Causal attention of one sequence in float64."""
    q, k, v = (a[row, at].astype(np.float64) for a in (q, k, v))
    scores = np.einsum("qkgh,skh->kgqs", q, k) * case.head**-0.5
    if case.softcap is not None:
        scores = case.softcap * np.tanh(scores / case.softcap)
    distance = np.arange(len(at))[:, None] - np.arange(len(at))[None, :]
    scores = np.where((distance >= 0) & (distance < case.window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("kgqs,skh->qkgh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_packed_rows_give_what_each_sequence_gives_alone(rows: Packed, way: str, case: Case):
    with jax.enable_x64(case.dtype == "float64"):
        q, k, v = arrays(case, rows)
        ranges = within(key_ranges(rows.seen), jnp.int32(case.window))
        run = jax.jit(partial(WAYS[way], params=AttentionParams(case.head**-0.5, case.softcap)))
        actual = np.asarray(run(inputs_of(q, k, v, ranges)))
    assert actual.dtype == case.dtype
    assert np.isfinite(actual).all()
    for row, at in rows.sequences:
        np.testing.assert_allclose(actual[row, at], alone(case, q, k, v, row, at), atol=case.tolerance)


@pytest.mark.parametrize("most", [0, dense.ONE_THREAD])
@pytest.mark.parametrize("case", CASES)
def test_one_query_a_row_gives_what_it_gives_in_the_row(rows: Packed, case: Case, most: int, monkeypatch):
    """As of a token that is made next; two queries of a head of keys are multiplied one by one if few."""
    monkeypatch.setattr(dense, "ONE_THREAD", most)
    with jax.enable_x64(case.dtype == "float64"):
        q, k, v = arrays(case, rows)
        inputs = inputs_of(q, k, v, within(key_ranges(rows.seen), jnp.int32(case.window)))
        for row, at in rows.sequences:
            last_q, last_ranges = jax.tree.map(lambda a, n=at[-1]: a[:, n : n + 1], (inputs.q, inputs.ranges))
            one = inputs._replace(q=last_q, ranges=last_ranges)
            actual = dense.dense(one, AttentionParams(case.head**-0.5, case.softcap))
            expected = alone(case, q, k, v, row, at)[-1]
            np.testing.assert_allclose(actual[row, 0], expected, atol=case.tolerance)


@pytest.mark.parametrize("way", [w for w in WAYS if w != "query_chunked"])
def test_any_positions_may_be_the_queries(rows: Packed, way: str):
    case = Case(1, 2, 64)
    q, k, v = arrays(case, rows)
    at = np.random.default_rng(1).permutation(LENGTH)[:77]
    inputs, params = inputs_of(q, k, v, key_ranges(rows.seen)), AttentionParams(0.2)
    whole = dense.dense(inputs, params)
    some_q, some_ranges = jax.tree.map(lambda a: a[:, at], (inputs.q, inputs.ranges))
    some = jax.jit(partial(WAYS[way], params=params))(inputs._replace(q=some_q, ranges=some_ranges))
    np.testing.assert_allclose(some, whole[:, at], atol=1e-5)


@pytest.mark.parametrize("way", ["query_chunked", "blocks"])
def test_the_gradient_is_that_of_dense(rows: Packed, way: str, x64: None):
    case = Case(1, 2, 8, window=17, softcap=5.0, dtype="float64")
    inputs = tuple(map(jnp.asarray, arrays(case, rows)))
    ranges = within(key_ranges(rows.seen), jnp.int32(case.window))

    def value(name, q, k, v):
        out = PLAIN[name](AttentionInputs(q, k, v, ranges), AttentionParams(0.3, case.softcap))
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    for a, b in zip(*(jax.jit(jax.grad(partial(value, w), (0, 1, 2)))(*inputs) for w in (way, "dense")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("sinks", [False, True])
def test_forward_mode_is_that_of_dense_to_second_order(rows: Packed, sinks: bool, x64: None):
    case = Case(1, 2, 8, window=17, softcap=5.0, dtype="float64")
    inputs = tuple(map(jnp.asarray, arrays(case, rows)))
    along = tuple(jnp.cos(3 * a) for a in inputs)
    ranges = within(key_ranges(rows.seen), jnp.int32(case.window))
    sink = jnp.linspace(-1.0, 1.0, 2).reshape(1, 2) if sinks else None

    def value(attend, q, k, v):
        return attend(AttentionInputs(q, k, v, ranges, sink), AttentionParams(0.3, case.softcap))

    def derivatives(attend):
        first = lambda *at: jax.jvp(partial(value, attend), at, along)[1]  # noqa: E731
        return jax.jvp(first, inputs, along)

    for a, b in zip(*(jax.jit(partial(derivatives, way))() for way in (forward_blocks, dense.dense)), strict=True):
        assert np.isfinite(a).all()
        for row, at in rows.sequences:
            np.testing.assert_allclose(a[row, at], b[row, at], atol=1e-11)


@pytest.mark.parametrize("window", [NO_WINDOW, 70])
def test_keys_block_by_block_give_what_they_give_at_once(rows: Packed, window: int, x64: None):
    """Outputs, gradients (those of the sinks too) and the forward mode, where most queries need several blocks."""
    case = Case(1, 2, 8, window=window, softcap=5.0, dtype="float64")
    inputs = (*map(jnp.asarray, arrays(case, rows)), jnp.linspace(-1.0, 1.0, 2).reshape(1, 2))
    ranges = within(key_ranges(rows.seen), jnp.int32(case.window))
    real = jnp.asarray(rows.rows.lengths > 0, jnp.float64)[..., None, None, None]

    def value(attend, *arrays):
        q, k, v, sink = arrays
        return real * attend(AttentionInputs(q, k, v, ranges, sink), AttentionParams(0.3, case.softcap))

    def all_of(attend, forward):
        undifferentiated = partial(value, attend)(*inputs)
        out, back = jax.vjp(partial(value, attend), *inputs)
        along = jax.jvp(partial(value, forward), inputs, tuple(map(jnp.cos, inputs)))[1]
        return undifferentiated, out, *back(jnp.cos(out)), along

    expected = jax.jit(partial(all_of, dense.dense, dense.dense))()
    by_blocks = jax.jit(partial(all_of, partial(blocks, block=16), forward_blocks))()
    for a, b in zip(by_blocks, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(("count", "length"), [(1, 128), (3, 768), (2, 4096)])
def test_forward_and_backward_are_compiled_once_whatever_the_rows(count: int, length: int):
    """A product more is a body more: a branch for each number of blocks was a third of what a first step compiled."""
    shapes = ((count, length, 1, 2, 8), *[(count, length, 1, 8)] * 2)
    ranges = KeyRanges(*[jnp.zeros((count, length), jnp.int32)] * 4)

    def value(q, k, v, ranges):
        return jnp.sum(blocks(AttentionInputs(q, k, v, ranges), AttentionParams(0.3)))

    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    text = jax.jit(jax.grad(value, (0, 1, 2))).lower(*arrays, ranges).as_text()
    # scores and outputs; scores again, and by weights, queries, keys, values
    assert text.count("stablehlo.dot_general") == 2 + 5
    # the two masks, which are made in a branch that is always taken
    assert text.count("stablehlo.case") == 2
    text = jax.jit(value).lower(*arrays, ranges).as_text()
    assert (text.count("stablehlo.dot_general"), text.count("stablehlo.case")) == (2, 1)


def test_gradients_by_the_scores_of_a_query_add_up_to_zero_in_16_bits(rows: Packed):
    """Where all keys are one, the gradient by a query is that sum times the key."""
    case = Case(1, 2, 32)
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays(case, rows))
    inputs = (q, jnp.broadcast_to(k[:1, :1], k.shape), v)
    along = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def value(q, k, v):
        out = blocks(AttentionInputs(q, k, v, key_ranges(rows.seen)), AttentionParams(0.3))
        return jnp.sum(out.astype(jnp.float32) * along)

    by_queries, _, by_values = jax.jit(jax.grad(value, (0, 1, 2)))(*inputs)
    assert float(jnp.abs(by_values).max()) > 0.5
    assert float(jnp.abs(by_queries).max()) < 1e-4


@pytest.mark.parametrize(("queries", "keys", "window"), [(16, 16, NO_WINDOW), (64, 32, NO_WINDOW), (32, 64, 9)])
@pytest.mark.parametrize("seed", range(4))
def test_the_blocks_of_keys_hold_all_that_is_seen_once_each_and_hardly_more(
    seed: int, queries: int, keys: int, window: int
):
    rng = np.random.default_rng(seed)
    rows = packed(rng.integers((1, 0, 0, 0), (90, 9, 90, 90), (9, 4)).tolist(), 320)
    ranges = within(key_ranges(rows.seen), jnp.int32(window))
    count, length = ranges.own_start.shape
    mask = np.asarray(visible(ranges, jnp.arange(length)))
    needed = np.any(mask.reshape(count, length // queries, queries, length // keys, keys), axis=(2, 4))
    spans = block_spans(ranges, queries, keys)
    steps = jnp.arange(length // keys + 1)[None, None]
    order = np.asarray(block_index(jax.tree.map(lambda a: a[..., None], spans), steps))
    for row, block in np.ndindex(needed.shape[:2]):
        indices = order[row, block, : int(spans.num_blocks[row, block])]
        assert (np.diff(indices) > 0).all()
        assert set(np.flatnonzero(needed[row, block])) <= set(indices) <= set(range(length // keys))
    assert int(spans.num_blocks.sum()) <= 1.1 * needed.sum()
