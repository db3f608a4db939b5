"""One model behind several views: flax.linen beside flax.nnx, layers recomputed, a mesh of devices. Same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import make_mesh
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.sharding import placement
from ches_jax.types import Response, TokenPair
from tests.theory.models.linen_decoder import of_decoder
from theory.models import kernels, lmview
from theory.toy.search import run_once


def pair(prompt, chosen, rejected):
    return TokenPair(row_id="r", index=0, prompt=prompt, chosen=Response(chosen, 2), rejected=Response(rejected, None))


# three pairs: no multiple of the devices
PAIRS = [pair((5, 6), (7, 8), (7, 9, 10)), pair((5, 6, 4), (3,), (11, 12)), pair((9,), (4, 4), (4, 5))]
CHOSEN, REJECTED = lmview.sequences_of(PAIRS)


def loss(up, down):
    return (jnp.arange(1.0, 4.0) * jax.nn.softplus(down - up)).sum()


def measured(view, params):
    """Log-probabilities, rates, kernels and scores, in one compiled call."""

    def everything(p, chosen, rejected):
        return {
            "log-probabilities": lmview.pair_log_probs(view, p, chosen, rejected),
            "rates": kernels.batch_rates(view, p, chosen, rejected, loss, lmview.both_sides(chosen, rejected)),
            "kernels": kernels.pair_grams(view, p, chosen, rejected).total(),
            "head": kernels.pair_head_scores(view, p, chosen, rejected).score,
            "head gram": kernels.head_gram(view, p, lmview.both_sides(chosen, rejected)),
        }

    return jax.device_get(run_once(everything, params, CHOSEN, REJECTED))


def load(directory, **options):
    return load_model(directory, dtype="float64", param_dtype="float64", **options)


@pytest.fixture(scope="module")
def plain(tiny_model):
    with jax.enable_x64(True):
        return measured(*lmview.decoder_view(load(tiny_model)))


def compare(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), actual, expected)


def test_a_linen_module_is_seen_as_the_decoder_is(x64, tiny_model, plain):
    module, params = of_decoder(load(tiny_model), remat=True)
    view = lmview.LinenView(module, unembed=lambda p: p["lm_head"]["kernel"].T)
    compare(measured(view, params), plain)


@pytest.mark.slow
def test_layers_that_are_computed_again_change_nothing(x64, tiny_model, plain):
    compare(measured(*lmview.decoder_view(load(tiny_model), remat=True)), plain)


@pytest.mark.slow
def test_a_mesh_of_devices_changes_nothing(x64, tiny_model, plain):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    view, params = lmview.decoder_view(load(tiny_model, sharding=placement(mesh)), mesh=mesh)
    spread = [p for p in jax.tree.leaves(params) if not p.sharding.is_fully_replicated]
    assert len(spread) > 5 and view.rows == 4
    compare(measured(view, params), plain)
    # a velocity lies where the parameters do
    velocity = jax.jit(lambda p, c, r: kernels.direction(view, p, c, r, loss))(params, CHOSEN, REJECTED)
    assert not all(v.sharding.is_fully_replicated for v in jax.tree.leaves(velocity))


def test_sequences_may_come_dealt_out(x64, tiny_model, plain):
    mesh = make_mesh("data=2")
    view, params = lmview.decoder_view(load(tiny_model, sharding=placement(mesh)), mesh=mesh)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    four = jax.tree.map(lambda a: jax.device_put(jnp.concatenate([a, a[:1]]), rows), CHOSEN)
    actual = jax.jit(lambda p, s: lmview.log_probs(view, p, s))(params, four)
    np.testing.assert_allclose(actual[:3], plain["log-probabilities"][0], rtol=1e-12)
    np.testing.assert_allclose(actual[3], actual[0], rtol=1e-12)


def test_nothing_on_the_way_lacks_a_forward_mode(x64, tiny_model):
    view, params = lmview.decoder_view(load(tiny_model))
    program = jax.make_jaxpr(lambda p: kernels.direction(view, p, CHOSEN, REJECTED, loss))(params)
    # a kernel with a backward pass of its own would show as one of these
    assert "custom_vjp" not in str(program) and "pallas" not in str(program)


def test_names_choose_what_moves(x64, tiny_model):
    module, params = of_decoder(load(tiny_model))
    view = lmview.LinenView(module, unembed=lambda p: p["lm_head"]["kernel"].T, only="lm_head")
    assert sum(jax.tree.leaves(view.trainable(params))) == 1
