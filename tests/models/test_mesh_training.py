"""What training computes on eight devices is what one computes: log-probabilities and every gradient, of each family.

Packed rows of pairs that share prompts, under DPO and a balance loss of the routers, in float64: a gradient
that lacks a device's part, or counts it twice, is wrong by far more than rounding.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from ches_jax.data.packing import packed_length
from ches_jax.distributed.mesh import make_mesh
from ches_jax.losses import get_loss
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.models.families.registry import FAMILIES
from ches_jax.models.sharding import partition_spec, placement
from ches_jax.train.batch_loss import batch_loss
from ches_jax.train.data.batches import Batch, Layout, make_batch
from ches_jax.train.step import put
from ches_jax.types import Response, TokenPair

from .test_mesh import config_of

DENSE = ("data=8", "fsdp=8", "tensor=4,data=2")
EXPERTS = "expert=4,data=2"
PAIRS, ROW, VOCABULARY = 16, 64, 40


def has_experts(kind: str) -> bool:
    return config_of(kind).experts is not None


CASES = [(kind, words) for kind in FAMILIES for words in (*DENSE, *((EXPERTS,) if has_experts(kind) else ()))]


class Found(NamedTuple):
    """Of one update, before the optimizer."""

    loss: float
    logps: np.ndarray
    gradients: dict[str, np.ndarray]


def some_pairs() -> Batch:
    """Pairs of several lengths, two to a row; some responses begin alike. Eight rows, whatever the mesh."""
    rng = np.random.default_rng(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCABULARY, rng.integers(low, high)).tolist())

    pairs = []
    for i in range(PAIRS):
        both = tokens(1, 4) if i % 2 else ()
        chosen, rejected = (Response((*both, *tokens(2, 8)), 1) for _ in range(2))
        pairs.append(TokenPair(row_id=str(i), index=i, prompt=tokens(3, 9), chosen=chosen, rejected=rejected))
    assert max(packed_length(pair) for pair in pairs) <= ROW // 2
    layout = Layout(ROW, 8, "include", row_counts=(8,))
    reference = rng.normal(-20, 3, (2, PAIRS)).tolist()
    return make_batch(pairs, layout, reference, dtype=np.float64)


@cache
def parameters(kind: str) -> tuple[Decoder, dict[str, np.ndarray]]:
    """Of a random model, whose biases and norms say something."""
    model = Decoder(config_of(kind), rngs=nnx.Rngs(0), param_dtype="float64", dtype="float64")
    rng = np.random.default_rng(1)
    drawn = {}
    for name, value in named_parameters(model).items():
        noise = rng.normal(size=value.shape)
        drawn[name] = noise * value.shape[-1] ** -0.5 if value.ndim > 2 else np.asarray(value) + 0.3 * noise
    return abstract_decoder(model.config, dtype=jnp.float64, param_dtype=jnp.float64), drawn


def update(kind: str, mesh: Mesh | None) -> Found:
    abstract, params = parameters(kind)
    batch = some_pairs() if mesh is None else put(some_pairs(), mesh)
    balance = 0.1 if has_experts(kind) else 0.0

    @jax.jit
    def run(params, batch):
        def mean(params):
            model = with_parameters(abstract, params)
            value, (metrics, _) = batch_loss(model, get_loss("dpo"), batch, {}, router_balance=balance, mesh=mesh)
            return value, (metrics["logps/chosen"], metrics["logps/rejected"])

        return jax.value_and_grad(mean, has_aux=True)(params)

    if mesh is None:
        placed = {name: jnp.asarray(value) for name, value in params.items()}
    else:
        place = placement(mesh)
        placed = {name: jax.device_put(value, place(name, value.shape)) for name, value in params.items()}
    (loss, logps), gradients = run(placed, batch)
    return Found(float(loss), np.asarray(logps), {name: np.asarray(g) for name, g in gradients.items()})


@cache
def alone(kind: str) -> Found:
    return update(kind, None)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "words"), CASES)
def test_every_gradient_on_a_mesh_is_that_of_one_device(kind: str, words: str):
    expected, mesh = alone(kind), make_mesh(words)
    together = update(kind, mesh)
    assert together.loss == pytest.approx(expected.loss, rel=1e-12)
    np.testing.assert_allclose(together.logps, expected.logps, rtol=1e-12)
    whole = np.sqrt(sum(np.sum(g**2) for g in expected.gradients.values()))
    assert whole > 1e-3
    for name, value in expected.gradients.items():
        np.testing.assert_allclose(together.gradients[name], value, rtol=1e-10, atol=1e-12 * whole, err_msg=name)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if has_experts(kind)])
def test_experts_of_these_models_lie_on_an_axis_of_their_own(kind: str):
    """Or the test above would compare whole experts with whole experts."""
    mesh = make_mesh(EXPERTS)
    shapes = {n: v.shape for n, v in named_parameters(abstract_decoder(config_of(kind))).items() if ".experts." in n}
    assert shapes and all("expert" in str(partition_spec(name, shape, mesh)) for name, shape in shapes.items())
