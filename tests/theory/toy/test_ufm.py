"""The unconstrained-features model: shared prefixes share features, and identity (*) is autodiff, in the small."""

import jax
import jax.numpy as jnp
import numpy as np

from theory.statements.objectives import mean_of
from theory.toy import ufm
from theory.toy.instances import Draw, Noise, noise, random_batch


def one(numbers: Noise) -> Draw:
    return Draw(Noise(jnp.asarray(numbers.uniform[0]), jnp.asarray(numbers.normal[0])))


def toy(w, h, tokens):
    n = len(tokens)
    responses = ufm.Responses(
        jnp.array(tokens, jnp.int32)[:, None], jnp.zeros((n, 1), jnp.int32), jnp.ones((n, 1), bool)
    )
    return ufm.UFM(jnp.array(w), jnp.array(h)[None]), responses


def test_equal_prefixes_share_a_row_and_different_prompts_do_not():
    tokens = jnp.array([[4, 5, 6], [4, 7, 6], [4, 5, 6]])
    rows = ufm.share_contexts(jnp.array([0, 0, 1]), tokens)
    assert rows[0, 0] == rows[1, 0] and rows[0, 1] == rows[1, 1]
    assert rows[0, 2] != rows[1, 2]
    assert not set(rows[2].tolist()) & set(rows[:2].ravel().tolist())


def test_log_probabilities_leave_padding_out(x64):
    model = ufm.UFM(jnp.eye(3), jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    r = ufm.Responses(jnp.array([[0, 1]]), jnp.array([[0, 1]]), jnp.array([[True, False]]))
    np.testing.assert_allclose(ufm.log_probs(model, r), [1 - np.log(np.e + 2)], rtol=1e-15)


def test_the_residual_keeps_its_digits_where_the_model_is_sure(x64):
    e = ufm.residual(jnp.array([50.0, 0.0, 0.0]), jnp.array(0))
    np.testing.assert_allclose(e[0], 2 * np.exp(-50.0), rtol=1e-12)
    np.testing.assert_allclose(e.sum(), 0, atol=1e-36)


def test_the_closed_form_case_of_one_dimension(x64):
    # V = {y+, y-, z}, d = 1, W = (1, 3, -5), h = 0, DPO with beta 0.1 at the reference
    model, every = toy([[1.0], [3.0], [-5.0]], [0.0], [0, 1, 2])
    pairs = ufm.Pairs(*(ufm.Responses(*(a[i : i + 1] for a in every)) for i in (0, 1)))
    loss = mean_of(lambda u: jax.nn.softplus(-0.1 * u))
    expected = [-2 / 15, -1 / 3, 7 / 15]
    rates = jax.jit(lambda m: ufm.rates(m, pairs, loss, every))(model)
    np.testing.assert_allclose(rates, expected, rtol=1e-14)
    flow = jax.jit(lambda m: ufm.flow_rates(m, pairs, [loss], every)[0])(model)
    np.testing.assert_allclose(flow, expected, rtol=1e-14)


def test_the_kernel_is_the_gram_matrix_of_gradients(x64):
    i = random_batch(one(noise((3,), 1)), vocabulary=4, width=3, length=3, pairs=3)
    k = jax.jit(ufm.kernel)(i.model, i.pairs.chosen, i.pairs.rejected)
    j = [jax.jit(jax.jacrev(ufm.log_probs))(i.model, r) for r in i.pairs]
    np.testing.assert_allclose(k.head, np.einsum("avd,bvd->ab", j[0].unembedding, j[1].unembedding), atol=1e-13)
    np.testing.assert_allclose(k.body, np.einsum("acd,bcd->ab", j[0].features, j[1].features), atol=1e-13)
    everything = jax.jit(ufm.gram)(i.model, *i.pairs)
    np.testing.assert_allclose(everything[:3, 3:], k.total, rtol=1e-13)
    np.testing.assert_allclose(everything, everything.T, rtol=1e-12)
    by_token = jax.jit(ufm.token_kernel)(i.model, i.pairs.chosen, i.pairs.rejected)
    assert by_token.head.shape == (3, 3, 3)
    assert not np.asarray(by_token.total)[:, ~np.asarray(i.pairs.rejected.mask)].any()


def test_rescaling_and_the_gauge_leave_log_probabilities_alone(x64):
    i = random_batch(one(noise((4,), 1)), vocabulary=4, width=3, length=3, pairs=3)
    before = ufm.log_probs(i.model, i.probe)
    for moved in (ufm.rescale(i.model, 3.0), ufm.shift_gauge(i.model, jnp.array([1.0, -2.0, 0.5]))):
        np.testing.assert_allclose(ufm.log_probs(moved, i.probe), before, rtol=1e-12)
