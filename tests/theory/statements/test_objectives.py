"""Losses as the theorems read them: slopes of Appendix B, and the library's own losses behind the same door."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.losses import LossInputs, get_loss, loss_names
from theory.statements import objectives
from theory.statements.objectives import MARGIN_LOSSES


@pytest.mark.parametrize("which", range(len(MARGIN_LOSSES)), ids=lambda n: MARGIN_LOSSES[n].name)
def test_every_loss_decreases_at_the_reference_and_says_where_it_is_flat(x64, which):
    args = (jnp.asarray(which), jnp.asarray(0.3), jnp.asarray(0.3), jnp.asarray(0.1))
    assert objectives.margin_slope(*args) < 0
    far = objectives.margin_slope(args[0], jnp.asarray(50.0), args[2], args[3])
    assert (far < 0) == MARGIN_LOSSES[which].always_decreasing


def test_slopes_at_the_reference_are_those_of_appendix_b(x64):
    u, scale = jnp.asarray(1.7), jnp.asarray(0.1)
    assert float(jax.grad(objectives.dpo)(u, u, scale)) == pytest.approx(-0.05)
    assert float(jax.grad(objectives.ipo)(u, u, scale)) == pytest.approx(-10.0)
    assert float(jax.grad(objectives.rebel)(u, u, scale)) == pytest.approx(-0.2)


def of_sums(name, batch, chosen, rejected, **hyper):
    """A loss of the library at log-probabilities of whole responses: responses of one token."""
    loss = objectives.of_library(get_loss(name, **hyper), batch)
    return loss(chosen[:, None], rejected[:, None], jnp.zeros((len(chosen), 1)))


def test_the_toy_dpo_is_the_librarys(x64):
    values = jnp.array([[-3.0, -5.0], [-4.0, -1.0], [-2.5, -6.0], [-3.5, -2.0]])
    batch = LossInputs(ref_logp_chosen=values[2], ref_logp_rejected=values[3])
    theirs = of_sums("dpo", batch, values[0], values[1], beta=0.3)
    margins, ref = values[0] - values[1], values[2] - values[3]
    ours = jax.vmap(objectives.dpo, in_axes=(0, 0, None))(margins, ref, jnp.asarray(0.3)).mean()
    np.testing.assert_allclose(theirs, ours, rtol=1e-14)


def test_the_toy_dpop_is_the_librarys(x64):
    chosen, rejected, ref_chosen, ref_rejected = jnp.array([[-3.0, -1.0], [-4.0, -2.0], [-2.0, -2.0], [-3.0, -3.0]])
    batch = LossInputs(ref_logp_chosen=ref_chosen, ref_logp_rejected=ref_rejected)
    theirs = of_sums("dpop", batch, chosen, rejected, beta=0.3, lam=5.0)
    ours = objectives.dpop(ref_chosen, ref_rejected, 0.3, 5.0)(chosen, rejected)
    np.testing.assert_allclose(theirs, ours, rtol=1e-14)


def test_a_loss_of_tokens_reads_tokens(x64):
    chosen, rejected = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[-1.0, -1.0, 0.0]])
    mask = jnp.array([[1.0, 1.0, 1.0]]), jnp.array([[1.0, 1.0, 0.0]])
    batch = LossInputs(
        ref_token_logps_chosen=jnp.zeros((1, 3)),
        ref_token_logps_rejected=jnp.zeros((1, 3)),
        token_mask_chosen=mask[0],
        token_mask_rejected=mask[1],
    )
    loss = objectives.of_library(get_loss("ld_dpo", beta=0.1, alpha=0.5), batch)
    # beyond the shorter response's two tokens the third counts half
    assert float(loss(chosen, rejected, chosen)) == pytest.approx(np.log1p(np.exp(-0.1 * (-4.5 + 2))))


def test_every_loss_of_the_library_is_read():
    names = [loss.name for loss in objectives.library_losses()]
    assert len(names) == len(loss_names())
