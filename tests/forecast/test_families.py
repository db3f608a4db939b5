"""Every family of the registry: its push is its derivative, or the model says that it has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import ChesError
from ches_jax.forecast.model import Model, require_forward_mode
from ches_jax.forecast.passes import Measure, Pull, Push, Rows
from ches_jax.models.attention.dense import query_chunked
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.models.families.registry import FAMILIES, decoder_config
from ches_jax.train.data.batches import Layout
from ches_jax.types import Response, TokenPair
from tests.models.rows import ROWS

IDS = np.random.default_rng(3).integers(0, 101, 60).tolist()
PAIRS = [
    TokenPair(
        row_id=str(n), index=n, prompt=tuple(IDS[a : a + 5]), chosen=Response(tuple(IDS[a + 5 : a + 9]), 7),
        rejected=Response((*IDS[a + 5 : a + 7], *IDS[a + 12 : a + 14]), None),
    )
    for n, a in enumerate((0, 20, 40))
]  # fmt: skip
"""Two responses of each begin alike, one of them was cut."""


def random_model(family: str) -> tuple[Model, dict[str, jax.Array]]:
    """A random tiny model of a family in float64, and its parameters."""
    transformers = pytest.importorskip("transformers")
    rows = [row for row in ROWS if row.family == family]
    assert rows, f"{family}: no row in tests/models/rows.py, which a family needs"
    raw = getattr(transformers, rows[0].config)(**rows[0].base).to_dict()
    config = decoder_config({**raw, "architectures": [FAMILIES[family].ARCHITECTURE]}, family)
    plain = abstract_decoder(config, dtype=jnp.dtype("float64"), param_dtype=jnp.dtype("float64"))
    params = named_parameters(Decoder(config, rngs=nnx.Rngs(5), param_dtype=jnp.float64))
    mesh = make_mesh("data=1")
    return Model(plain, plain, {}, mesh), params


QUICK = {"gemma2", "mixtral"}
"""One dense and one routed family; the others, with layers of other kinds, are of the heavy tests."""


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in sorted(FAMILIES)]
)
def test_every_family_has_a_forward_mode(family, x64):
    """Traced, not computed."""
    model, params = random_model(family)
    require_forward_mode(model, params, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_push_is_the_derivative_in_every_family(family, x64):
    """Against central differences, and as the transpose of the pull."""
    model, params = random_model(family)
    threshold = model.plain.config.rope.length_threshold if model.plain.config.rope else None
    rows = Rows(Layout(64, 1, "include", threshold), model.mesh, 64, PAIRS)
    rng = np.random.default_rng(1)
    direction = {k: jnp.asarray(rng.normal(size=v.shape), v.dtype) for k, v in params.items()}
    for name in [name for name in params if name.endswith(".scalar")]:
        direction[name] *= 0  # a number of the file that is not trained
    found = Push(model, rows)(params, direction, PAIRS)
    # five points: the error is of order eps^4; further away a router chooses other experts
    measure, eps = Measure(model, rows), 1e-6
    at = [np.array(measure({k: p + n * eps * direction[k] for k, p in params.items()}, PAIRS)) for n in (-2, -1, 1, 2)]
    numeric = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * eps)
    np.testing.assert_allclose(found.first, numeric, atol=1e-8 * np.abs(numeric).max())
    coefficients = [rng.normal(size=2) for _ in PAIRS]
    pulled = Pull(model, rows)(params, PAIRS, coefficients)
    transposed = sum(float(jnp.vdot(pulled[k], direction[k])) for k in params)
    assert transposed == pytest.approx(float((np.array(coefficients) * np.array(found.first)).sum()), rel=1e-9)


def test_a_model_without_forward_mode_says_so(x64, monkeypatch):
    """A kernel with a backward pass of its own is closed to forward mode."""
    model, params = random_model("llama")

    closed = jax.custom_vjp(lambda x: x)
    closed.defvjp(lambda x: (x, None), lambda _, g: (g,))
    monkeypatch.setattr("ches_jax.forecast.model.in_forward_mode", lambda: lambda *args: closed(query_chunked(*args)))
    with pytest.raises(ChesError, match=r"my-model: this model has no forward mode.*`ches train --steps N`"):
        require_forward_mode(model, params, "my-model")
