"""Chunked log-probabilities against the plain computation, in value and gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

from ches_jax.models import logprobs
from ches_jax.models.logprobs import (
    LOGITS_KEPT,
    Head,
    chunk_size,
    chunks_kept,
    token_logps,
    token_statistics,
)

ROWS, COUNT, WIDTH, VOCABULARY = 2, 7, 5, 11


def inputs(dtype):
    rng = np.random.default_rng(3)
    h = jnp.asarray(rng.normal(size=(ROWS, COUNT, WIDTH)) * 2, dtype)
    w = jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)), dtype)
    y = jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, COUNT)), jnp.int32)
    g = jnp.asarray(rng.normal(size=(ROWS, COUNT)), dtype)
    return h, w, y, g


def plain(h, w, y, head):
    z = jnp.einsum("bmd,vd->bmv", h, w, precision="highest")
    if head.scale is not None:
        z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * jnp.tanh(z / head.softcap)
    return jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], axis=-1)[..., 0]


HEADS = [
    Head(),
    Head(0.3, None, 3),
    Head(None, 4.0, 2),
    Head(0.7, 2.5, 7),
    Head(None, None, 1),
    Head(None, None, 2, True),
]


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_value_and_gradient_equal_the_plain_computation(x64, monkeypatch, head, keeps):
    """Whether the backward pass finds logits kept (of all chunks but one) or computes them all again."""
    if not keeps:
        monkeypatch.setattr(logprobs, "LOGITS_KEPT", {})
    h, w, y, g = inputs(jnp.float64)

    def value_and_gradient(logps):
        def weighted(h, w):
            values = logps(h, w, y, head)
            return (values * g).sum(), values

        (_, values), slopes = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(h, w)
        return values, slopes

    ours, theirs = value_and_gradient(token_logps), value_and_gradient(plain)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-13)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    check_grads(
        jax.jit(lambda h, w: token_logps(jnp.asarray(h), jnp.asarray(w), y, head)),
        (h, w),
        order=1,
        modes=["rev"],
        atol=1e-7,
        rtol=1e-7,
    )


def test_half_precision_states_give_float32_log_probabilities():
    h, w, y, g = inputs(jnp.float32)
    half = h.astype(jnp.bfloat16)
    got = token_logps(half, w, y, Head())
    assert got.dtype == jnp.float32
    rounded = w.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(got, plain(half.astype(jnp.float32), rounded, y, Head()), atol=2e-5)
    dh, dw = jax.grad(lambda h, w: (token_logps(h, w, y, Head()) * g).sum(), (0, 1))(half, w)
    assert (dh.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    expected = jax.grad(lambda w: (plain(half.astype(jnp.float32), w, y, Head()) * g).sum())(rounded)
    np.testing.assert_allclose(dw, expected, atol=0.02 * float(jnp.abs(expected).max()))


def test_rounded_products_are_those_of_the_whole_logits():
    """``rounded``: h W^T in the dtype of the states, as a decoder's logits are, before anything in float32."""
    h, w, y, _ = inputs(jnp.bfloat16)
    z = jnp.einsum("bmd,vd->bmv", h, w).astype(jnp.float32)
    expected = jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(token_logps(h, w, y, Head(chunk=3, rounded=True)), expected, rtol=1e-6)
    assert not np.array_equal(token_logps(h, w, y, Head(chunk=3)), expected)


@pytest.mark.parametrize("count", [2048, 4096, 32768])
def test_logits_are_never_whole(count):
    """No intermediate of value or gradient has positions x vocabulary elements, and what waits for the gradient is
    bounded however many positions there are."""
    rows, width, vocabulary = 2, 8, 5000
    h, w = jnp.zeros((rows, count, width)), jnp.zeros((vocabulary, width))
    y = jnp.zeros((rows, count), jnp.int32)
    chunk = chunk_size(rows, count, vocabulary)
    assert chunk < count / 4
    kept = chunks_kept(rows, chunk, count, vocabulary)
    assert kept * chunk < count and rows * kept * chunk * vocabulary <= LOGITS_KEPT["cpu"]
    jaxpr = jax.make_jaxpr(jax.grad(lambda h, w: token_logps(h, w, y, Head()).sum(), (0, 1)))(h, w)
    shapes = {v.aval.shape for e in equations(jaxpr.jaxpr) for v in e.outvars}
    assert (rows, chunk, vocabulary) in shapes and (kept, rows, chunk, vocabulary) in shapes
    largest = max(rows * kept * chunk * vocabulary, w.size, h.size)
    assert max(math.prod(s) for s in shapes) <= largest


def equations(jaxpr):
    """Of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("head", HEADS)
def test_statistics_of_distributions_equal_the_plain_computation(x64, head):
    h, w, y, _ = inputs(jnp.float64)
    every = jnp.broadcast_to(jnp.arange(VOCABULARY, dtype=jnp.int32), (ROWS, COUNT, VOCABULARY))
    each = jax.jit(jax.vmap(lambda targets: plain(h, w, targets, head), in_axes=-1, out_axes=-1))
    table = np.asarray(each(every))
    statistics = jax.jit(lambda h, w: token_statistics(h, w, y, head))(h, w)
    logps, entropy, mass = np.moveaxis(np.asarray(statistics), -1, 0)
    np.testing.assert_allclose(logps, np.take_along_axis(table, np.asarray(y)[..., None], -1)[..., 0], rtol=1e-13)
    np.testing.assert_allclose(entropy, -(np.exp(table) * table).sum(-1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(mass, np.exp(table).max(-1), rtol=1e-13)
