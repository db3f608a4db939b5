"""A cache changes no number: prefill and single steps give the hidden states of one pass over the whole row."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.distributed.mesh import make_mesh
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import dense
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import Decoder, cache_stacked, layer_by_layer

TOKENS, PROMPT, ROWS = 40, 32, 4
FIRST = jnp.array([0, 5, 17, 31], jnp.int32)
"""Padding of different lengths, up to a prompt of one token; windows of the golden models are shorter than the rows."""


def ids() -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(0).integers(5, 400, (ROWS, TOKENS)), jnp.int32)


@nnx.jit
def whole(model: Decoder, tokens):
    return model.hidden(tokens, mask=jnp.arange(TOKENS, dtype=jnp.int32)[None] >= FIRST[:, None])


@nnx.jit(static_argnames=("attend", "mesh"))
def prefill(model: Decoder, tokens, attend=dense, mesh=None):
    return model.prefill(tokens, FIRST, TOKENS, attend=attend, mesh=mesh)


@nnx.jit(static_argnames="mesh")
def extend(model: Decoder, tokens, kept, slot, layers=None, mesh=None):
    return model.extend(tokens, kept, slot, FIRST, apart=layers, mesh=mesh)


def error(model: Decoder, steps: tuple[int, ...], attend=dense, mesh=None, apart=False) -> float:
    """Largest difference on real tokens, by the largest state; the rest of the row comes in ``steps`` tokens."""
    tokens = ids()
    layers = nnx.jit(Decoder.layers_apart)(model) if apart else None
    expected = whole(model, tokens)
    states, kept = prefill(model, tokens[:, :PROMPT], attend=attend, mesh=mesh)
    stacked = jax.tree.structure(kept)
    kept = layer_by_layer(model.config, kept) if apart else kept
    actual, slot = [states], PROMPT
    for n in steps:
        states, kept = extend(model, tokens[:, slot : slot + n], kept, jnp.int32(slot), layers, mesh=mesh)
        actual.append(states)
        slot += n
    assert jax.tree.structure(cache_stacked(model.config, kept) if apart else kept) == stacked
    real = (np.arange(slot)[None] >= np.asarray(FIRST)[:, None])[..., None]
    wrong = np.where(real, np.concatenate(actual, axis=1) - expected[:, :slot], 0)
    return float(np.abs(wrong).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_step_by_step_gives_the_states_of_the_whole_row(golden: Path, family: str):
    model = load_model(golden / family / "policy")
    assert error(model, (1, 1, 1)) < 2e-6
    assert error(model, (1, 2), apart=True) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama_tied",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "olmo",
        "olmo2",
        "gpt_neox",
        "phi3",
        "starcoder2",
        "cohere2",
        "gpt_oss",
        "deepseek_v3",
        "llama4",
        "lfm2",
        "gemma4",
        "qwen3_5",
    ],
)
def test_every_family_and_several_tokens_at_once(x64, golden: Path, family: str):
    model = load_model(golden / family / "policy", param_dtype="float64", dtype="float64")
    assert error(model, (1, 1, 1)) < 1e-12
    assert error(model, (3, 5), attend=partial(blocks, block=8)) < 1e-12
    assert error(model, (1, 2), apart=True) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("words", ["fsdp=2", "data=2,tensor=2", "tensor=4"])
def test_devices_change_nothing(golden: Path, words: str):
    from ches_jax.models.sharding import placement

    mesh = make_mesh(words)
    model = load_model(golden / "gemma2" / "policy", sharding=placement(mesh))
    assert error(model, (1, 1), mesh=mesh) < 2e-6
