"""The claims hold: a few of each kind in the fast suite, all of them at full size with ``-m slow``."""

import jax
import jax.numpy as jnp
import pytest

from theory.claims.identities import BATCH, _library
from theory.toy.instances import Draw, Noise, noise
from theory.verify import verify

FAST = {
    "identities": ["T4", "T4c", "T4r", "T5", "MR", "D3", "T6", "T7", "MRs", "P1", "P2"],
    "several samples": ["T8", "T9"],
    "kernel identity": ["K0"],
    "bounds": ["A2", "A3", "A6", "D1", "D2", "D1i"],
    "errata": ["X5", "XP2", "XL2"],
    "flows": ["L1", "R2", "R1"],
    "neighbours": ["E1", "E2", "E6"],
    "a data set as a whole": ["I3", "N1", "N1f", "N2", "GR"],
}


@pytest.mark.parametrize("ids", FAST.values(), ids=FAST)
def test_claims_hold(ids):
    results = verify(ids, instances=100, quiet=True)
    assert {r.id: r.value for r in results if not r.passed} == {}
    assert [r.id for r in results] == ids


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_every_claim_about_toy_models_holds_at_full_size(seed):
    results = verify(seed=seed, quiet=True)
    assert {r.id: r.value for r in results if not r.passed} == {}
    assert all(r.n >= 1000 for r in results if r.status == "exact" and r.tolerance == 1e-10)


def test_every_loss_of_the_library_can_be_asked(x64):
    """Traced, not run: a loss that reads what the claim of all losses does not give ends here."""
    draw = Draw(Noise(*(jnp.asarray(part[0]) for part in noise((0,), 1))))
    value = jax.eval_shape(lambda: _library(draw, **BATCH[0] | {"pairs": 3}))
    assert value["K0L"].shape == ()
