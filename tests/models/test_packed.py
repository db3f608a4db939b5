"""QLoRA: a frozen base in the bytes of its quantised file computes what its dequantised weights do."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.distributed.mesh import make_mesh
from ches_jax.models.adapters.lora import adapted, make_spec
from ches_jax.models.adapters.packed import is_packed, load_packed, with_packed
from ches_jax.models.checkpoint.load import load_model, with_parameters
from ches_jax.models.decoder import abstract_decoder, named_parameters

from .quantise import FORMATS, Format, nf4
from .test_quantised import TEXT
from .test_strict import weights

WIDE: dict[str, Any] = TEXT | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
NF4 = FORMATS["nf4"].config
KINDS = {
    "nf4": Format(NF4, nf4(False)),
    "nf4_nested": Format(NF4, nf4(True)),
    "int8": FORMATS["int8"],
}


def quantised(kind: str, write_model: Any, raw: dict[str, Any] = WIDE) -> Path:
    """A Llama whose rows hold whole blocks of nf4."""
    rng = np.random.default_rng(0)
    stored: dict[str, np.ndarray] = {}
    for name, value in weights(raw).items():
        if name.endswith(("_proj.weight", ".gate.weight")):
            written = KINDS[kind].write(rng, *value.shape)
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{part}": np.ascontiguousarray(a) for part, a in written.parts.items()}
        else:
            stored[name] = rng.normal(size=value.shape).astype(np.float32)
    return write_model(raw | {"quantization_config": KINDS[kind].config}, stored)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_base_is_the_dequantised_one(kind: str, write_model: Any):
    directory = quantised(kind, write_model)
    plain = load_model(directory)
    arrays, dtypes = load_packed(directory, make_mesh("data=1"))
    assert len(dtypes) == 7
    assert all(a.dtype in (jnp.uint8, jnp.int8) for n, a in arrays.items() if n.endswith(".codes"))
    model = with_parameters(with_packed(abstract_decoder(plain.config), dtypes, arrays), arrays)
    ids = jnp.array([[1, 5, 3, 2]])
    hidden = nnx.jit(lambda m, ids: m.hidden(ids))
    np.testing.assert_array_equal(hidden(model, ids), hidden(plain, ids))


def test_a_router_is_never_packed(write_model: Any):
    """bitsandbytes packs Mixtral's on transformers 4."""
    raw = WIDE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
    directory = quantised("nf4", write_model, raw)
    arrays, dtypes = load_packed(directory, make_mesh("data=1"))
    assert list(dtypes) == [f"layers.self_attn.{p}_proj" for p in sorted("koqv")]
    with_packed(abstract_decoder(load_model(directory).config), dtypes, arrays)
    np.testing.assert_array_equal(
        arrays["layers.mlp.router.weight"], named_parameters(load_model(directory))["layers.mlp.router.weight"]
    )


@pytest.mark.slow
def test_adapters_beside_a_packed_base_get_the_same_gradient(write_model: Any):
    directory = quantised("nf4", write_model)
    plain = load_model(directory)
    arrays, dtypes = load_packed(directory, make_mesh("data=1"))
    spec = make_spec(2, 4.0, "all-linear", plain.config)
    ids = jnp.array([[1, 5, 3, 2]])

    def gradient(frozen: dict[str, Any], packed: dict[str, str]) -> dict[str, Any]:
        abstract = with_packed(adapted(abstract_decoder(plain.config), spec), packed, frozen)
        shapes = {n: a.shape for n, a in named_parameters(abstract).items() if ".lora_" in n}
        rng = np.random.default_rng(0)
        start = {n: jnp.asarray(rng.normal(size=shape), jnp.float32) * 0.1 for n, shape in sorted(shapes.items())}

        @jax.jit
        def loss(trained: dict[str, Any], frozen: dict[str, Any]) -> Any:
            return (with_parameters(abstract, {**frozen, **trained}).hidden(ids) ** 2).sum()

        return jax.grad(loss)(start, frozen)

    assert any(is_packed(name) for name in arrays)
    packed = gradient(arrays, dtypes)
    whole = gradient(named_parameters(plain), {})
    assert packed.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(packed[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("kind", ["awq", "nf4"])
def test_what_has_no_packed_form_is_dequantised(kind: str, write_model: Any):
    from .test_quantised import model as other

    raw, stored, _ = other(FORMATS[kind])  # rows of 16, which no block of nf4 ends with
    arrays, dtypes = load_packed(write_model(raw, stored), make_mesh("data=1"))
    assert not dtypes
    assert not any(is_packed(name) for name in arrays)
