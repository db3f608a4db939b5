"""A model spread over eight devices gives the states of the model on one, and each device holds its share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.distributed.mesh import make_mesh, parse_mesh
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.mask import Visibility
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, named_parameters
from ches_jax.models.families.registry import FAMILIES, decoder_config
from ches_jax.models.sharding import partition_spec, placement

from .test_strict import family

MESHES = (
    "data=8", "fsdp=8", "tensor=8", "data=4,fsdp=2", "data=2,tensor=4", "fsdp=4,tensor=2", "expert=4,data=2",
    "expert=2,fsdp=2,tensor=2",
)  # fmt: skip
FAST = frozenset({"gemma2", "gpt2", "llama", "phi3"})
"""Families on one mesh of three axes in the fast suite; the others add no way to lie on it but experts (below)."""
SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 4, "linear_num_value_heads": 8}
OWN = {
    **{kind: {"head_dim": 12} for kind in ("cohere2", "olmoe")},
    **dict.fromkeys(("qwen3_5_text", "qwen3_next", "qwen3_5_moe_text"), DELTA),
}
"""What decides which arrays can be spread, where the sizes of all families do not."""
GPT2 = {"vocab_size": 40, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}


def config_of(kind: str) -> DecoderConfig:
    if kind == "gpt2":
        return decoder_config(family(kind, **GPT2))
    if kind in {"gpt_neox", "deepseek_v3"}:
        own = {k: v for k, v in SIZES.items() if k not in {"head_dim", "num_key_value_heads"}}
        return decoder_config(family(kind, **own, **({"rotary_pct": 0.5} if kind == "gpt_neox" else {})))
    return decoder_config(family(kind, **{**SIZES, **OWN.get(kind, {})}))


def two_sequences_a_row() -> dict[str, Any]:
    """Packed rows: the second sequence continues the first one's beginning, as a rejected response does."""
    here = np.arange(32)
    second = here >= 20
    own, end = np.where(second, 20, 0), np.where(second, 12, 0)
    rows = [
        np.broadcast_to(a, (8, 32)).astype(np.int32) for a in (np.zeros(32), end, own, np.where(second, here - 8, here))
    ]
    tokens = np.random.default_rng(0).integers(0, 40, (8, 32)).astype(np.int32)
    return {"tokens": tokens, "positions": rows[3], "mask": Visibility(*map(jnp.asarray, rows[:3]))}


def states(model: Decoder, mesh: Any, **options: Any) -> np.ndarray:
    run = jax.jit(lambda m, b: m.hidden(**b, **{"attend": partial(blocks, block=16), "mesh": mesh, **options}))
    return np.asarray(run(model, two_sequences_a_row()))


def spread(model: Decoder, mesh: Any) -> Decoder:
    place = placement(mesh)
    arrays = {n: jax.device_put(v, place(n, v.shape)) for n, v in named_parameters(model).items()}
    return with_parameters(model, arrays)


def check(kind: str, words: str) -> None:
    """In float64, where rounding hides nothing: a sum that lacks a part shows, however small the part is."""
    with jax.enable_x64(True):
        model = Decoder(config_of(kind), rngs=nnx.Rngs(1), param_dtype="float64", dtype="float64")
        nnx.update(model, jax.tree.map(lambda w: w * 5 if w.ndim > 1 else w, nnx.state(model)))
        alone = states(model, None)
        mesh = make_mesh(words)
        together = states(spread(model, mesh), mesh)
    np.testing.assert_allclose(together, alone, atol=1e-12 * np.abs(alone).max())


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in FAMILIES])
def test_eight_devices_give_the_states_of_one(kind: str):
    check(kind, "data=2,fsdp=2,tensor=2")


def test_experts_on_their_own_axis_give_the_states_of_one_device():
    check("qwen3_moe", "expert=4,data=2")


@pytest.mark.slow
@pytest.mark.parametrize("words", MESHES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_mesh_gives_the_states_of_one_device(kind: str, words: str):
    check(kind, words)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_fsdp_memory_per_device_falls_as_one_over_n(parts: int):
    model = Decoder(config_of("llama"), rngs=nnx.Rngs(0))
    whole = sum(v.nbytes for v in named_parameters(model).values())
    sharded = named_parameters(spread(model, make_mesh(f"fsdp={parts}")))
    held = max(
        sum(s.data.nbytes for v in sharded.values() for s in v.addressable_shards if s.device == d)
        for d in jax.devices()[:parts]
    )
    assert held == whole / parts


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = make_mesh("tensor=4,fsdp=2")
    assert partition_spec("layers.self_attn.q_proj.weight", (3, 90, 64), mesh) == jax.P(None, None, "fsdp")
    assert partition_spec("layers.mlp.down_proj.weight", (3, 63, 64), mesh) == jax.P(None, None, "tensor")


def test_meshes_in_words():
    assert parse_mesh("data=2, tensor=4") == {"data": 2, "fsdp": 1, "tensor": 4, "expert": 1}
