"""Every family against transformers: hidden states and logits in, weights out again, dense and block attention."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import Attend, dense
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.checkpoint.save import save_pretrained
from ches_jax.models.decoder import Decoder

from .rows import ROWS, TOKENS, Row

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = np.random.default_rng(0).integers(0, 101, (1, TOKENS))
FAST = {("llama", name) for name in ("dynamic", "llama3", "yarn_mscale")} | {
    ("phi3", "long"),
    ("gpt_neox", "sequential"),
    ("olmo", "clipped"),
}
EAGER: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""Plain torch operations: the grouped ones refuse odd sizes."""
SMALL_BLOCKS = partial(blocks, block=8)
SLOW = {"glm4_moe", "qwen2_moe", "qwen3_5_moe_text"}
"""Families put together from parts that the rows of others run through."""
BASES = [pytest.param(row, {}, id=row.family, marks=pytest.mark.slow if row.family in SLOW else ()) for row in ROWS]
LEADING = {"llama", "gemma2", "gpt_neox", "gpt2", "phi3", "mixtral", "gpt_oss", "deepseek_v3", "lfm2", "qwen3_5_text"}
"""A family of each kind of layer, and of each layout of its file."""
LEADERS = [
    pytest.param(row, {}, id=row.family, marks=() if row.family in LEADING else pytest.mark.slow) for row in ROWS
]
VARIANTS = [
    pytest.param(row, extra, id=f"{row.family}-{name}", marks=() if (row.family, name) in FAST else pytest.mark.slow)
    for row in ROWS
    for name, extra in row.variants.items()
]


class Outputs(NamedTuple):
    """What the two implementations are compared by."""

    hidden: np.ndarray
    logits: np.ndarray


class Made(NamedTuple):
    """A random model of a family in a directory, what transformers computes with it, and what we do."""

    directory: Path
    expected: Outputs
    actual: Callable[[Attend], Outputs]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[Row, dict[str, Any]], Made]:
    """Every model is made once."""
    kept: dict[tuple[str, str], Made] = {}

    def get(row: Row, extra: dict[str, Any]) -> Made:
        key = row.family, repr(extra)
        if key not in kept:
            directory = tmp_path_factory.mktemp(row.family)
            expected = make(row, extra, directory)
            ours = partial(jax_outputs, load_model(directory), jnp.asarray(IDS, jnp.int32))
            kept[key] = Made(directory, expected, lambda attend: Outputs(*ours(attend)))
        return kept[key]

    return get


def make(row: Row, extra: dict[str, Any], directory: Path) -> Outputs:
    """A random model of the family, written by transformers, and what it computes."""
    # a config writes into the dictionaries that it is given, which other rows share
    settings = copy.deepcopy({**row.base, **extra})
    config = getattr(transformers, row.config)(**settings, attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what a family draws of its own and noise below only shifts: decays of a state
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            # away from the initial ones and zeros, which a norm or a bias in the wrong place would share
            noise = torch.randn(p.shape, generator=generator)
            p.add_(0.3 * noise) if p.ndim == 1 else p.copy_(noise * p.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "layer_scalar")):  # stored, though not trained
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(directory)
    return torch_outputs(model)


def torch_outputs(model: Any) -> Outputs:
    with torch.no_grad():
        hidden = getattr(model, "model", model.base_model)(torch.tensor(IDS)).last_hidden_state
        return Outputs(hidden.numpy(), model(torch.tensor(IDS)).logits.numpy())


@nnx.jit(static_argnames="attend")
def jax_outputs(model: Decoder, ids: Any, attend: Attend) -> tuple[Any, Any]:
    hidden = model.hidden(ids, attend=attend)
    return hidden, model.logits(hidden)


def relative(actual: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def check(model: Made, tolerance: float, attend: Attend = dense) -> None:
    actual = model.actual(attend)
    assert relative(actual.hidden, model.expected.hidden) < tolerance
    assert relative(actual.logits, model.expected.logits) < tolerance


@pytest.mark.parametrize(("row", "extra"), [*BASES, *VARIANTS])
def test_hidden_states_and_logits_equal_those_of_transformers(row: Row, extra: dict[str, Any], made):
    model = made(row, extra)
    assert np.ptp(model.expected.logits, axis=1).max() > 0.1
    check(model, row.tolerance)


@pytest.mark.parametrize(("row", "extra"), LEADERS)
def test_block_attention_equals_that_of_transformers(row: Row, extra: dict[str, Any], made):
    check(made(row, extra), row.tolerance, SMALL_BLOCKS)


@pytest.mark.parametrize(("row", "extra"), [*LEADERS, *VARIANTS])
def test_export_gives_back_every_tensor(row: Row, extra: dict[str, Any], tmp_path: Path, made):
    original = made(row, extra).directory
    save_pretrained(load_model(original), tmp_path / "out", like=original)
    before, after = (load_file(d / "model.safetensors") for d in (original, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **EAGER).eval()
    np.testing.assert_array_equal(torch_outputs(opened).logits, made(row, extra).expected.logits)


@pytest.mark.parametrize(("row", "extra"), BASES)
def test_configs_left_at_their_defaults_mean_what_they_mean_to_transformers(row: Row, extra: dict[str, Any]):
    from ches_jax.models.families.registry import decoder_config

    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    sizes |= {"n_embd", "n_head", "n_layer"}
    raw = {"model_type": row.family, **{k: v for k, v in row.base.items() if k in sizes}}
    if row.family not in {"gpt2", "gpt_neox"}:
        raw |= {"num_attention_heads": 128, "hidden_size": 512}  # a multiple of every default of num_key_value_heads
    full = json.loads(getattr(transformers, row.config)(**raw).to_json_string(use_diff=False))
    assert decoder_config(raw) == decoder_config({**full, "model_type": row.family})
