"""What a directory says in two ways is read as transformers reads it, or refused with both readings named."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ches_jax.errors import CheckpointError
from ches_jax.hf.directory import weight_files
from ches_jax.hf.tensors import BUFFERS, open_tensors, same_values
from ches_jax.models.checkpoint.load import load_model, open_checkpoint
from ches_jax.models.checkpoint.save import save_pretrained
from ches_jax.models.checkpoint.stored_names import effective_config
from ches_jax.models.families.registry import decoder_config
from tests.models.test_strict import TINY, family, message, weights

TOKENS = np.array([[1, 5, 9, 2, 7, 3]])
LLAMA = TINY | {"num_key_value_heads": 3, "head_dim": 4}


def random_weights(raw: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        n: rng.normal(0.3 if "norm" in n or "ln_" in n else 0, 0.5, v.shape).astype(np.float32)
        for n, v in weights(raw).items()
    }


def write(directory: Path, raw: dict[str, Any], files: dict[str, dict[str, np.ndarray]], index: Any = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    for name, tensors in files.items():
        save_file(tensors, directory / name, metadata={"format": "pt"})
    if index is not None:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (directory / "model.safetensors.index.json").write_text(text)
    return directory


def single(directory: Path, raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    return write(directory, raw, {"model.safetensors": tensors})


def assert_same_logits(directory: Path) -> None:
    """Ours are those of transformers, whose values are float32 sums in another order."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    actual = np.asarray(load_model(directory)(TOKENS))
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def tied_other_head(d: Path) -> Path:
    return single(d, LLAMA | {"tie_word_embeddings": True}, random_weights(LLAMA))


def tied_head_alone(d: Path) -> Path:
    tensors = random_weights(LLAMA)
    del tensors["model.embed_tokens.weight"]
    return single(d, LLAMA | {"tie_word_embeddings": True}, tensors)


def gpt2_other_head(d: Path) -> Path:
    """Tied by the family's default, not by a key."""
    raw = family("gpt2", n_positions=16)
    return single(d, raw, random_weights(raw | {"tie_word_embeddings": False}))


def neox_other_head(d: Path) -> Path:
    raw = family("gpt_neox")
    return single(d, raw | {"tie_word_embeddings": True}, random_weights(raw))


def neox_head_under_its_new_name(d: Path) -> Path:
    raw = family("gpt_neox")
    tensors = random_weights(raw)
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    return single(d, raw, tensors)


def prefix_too_little(d: Path) -> Path:
    return single(d, LLAMA, {n.removeprefix("model."): v for n, v in random_weights(LLAMA).items()})


def prefix_too_much(d: Path) -> Path:
    """The head below the name of the model; some tensors with the prefix and some without."""
    tensors = random_weights(LLAMA)
    tensors["model.lm_head.weight"] = tensors.pop("lm_head.weight")
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    return single(d, LLAMA, tensors)


def single_and_old_index(d: Path) -> Path:
    old = random_weights(LLAMA, seed=1)
    write(d, LLAMA, {"model-00001-of-00001.safetensors": old}, dict.fromkeys(old, "model-00001-of-00001.safetensors"))
    return single(d, LLAMA, random_weights(LLAMA))


def single_and_damaged_index(d: Path) -> Path:
    single(d, LLAMA, random_weights(LLAMA))
    (d / "model.safetensors.index.json").write_text("{")
    return d


def left_over_shard(d: Path) -> Path:
    """A file that the index does not name holds the same names."""
    tensors = random_weights(LLAMA)
    files = {"model-00001-of-00002.safetensors": tensors, "zz.safetensors": random_weights(LLAMA, seed=2)}
    return write(d, LLAMA, files, dict.fromkeys(tensors, "model-00001-of-00002.safetensors"))


def stored_in_an_earlier_shard_too(d: Path) -> Path:
    tensors = random_weights(LLAMA)
    name, stale = "model.norm.weight", np.full_like(tensors["model.norm.weight"], 7)
    rest = {n: v for n, v in tensors.items() if n != name}
    files = {"a.safetensors": rest | {name: stale}, "b.safetensors": {name: tensors[name]}}
    return write(d, LLAMA, files, dict.fromkeys(rest, "a.safetensors") | {name: "b.safetensors"})


def buffers(d: Path) -> Path:
    raw = family("gpt_neox")
    more: dict[str, np.ndarray] = {
        "gpt_neox.layers.0.attention.bias": np.tril(np.ones((1, 1, 16, 16), np.uint8)),
        "gpt_neox.layers.1.attention.bias": np.tril(np.ones((1, 1, 16, 16), np.bool_)),
        "gpt_neox.layers.0.attention.masked_bias": np.array(-1e9, np.float32),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(1, np.float16),
        "gpt_neox.rotary_emb.inv_freq": np.ones(1, np.float64),
    }
    return single(d, raw, random_weights(raw) | more)


def gpt2_buffers(d: Path) -> Path:
    raw = family("gpt2", n_positions=16)
    bare = {n.removeprefix("transformer."): v for n, v in random_weights(raw).items()}
    more = {"h.0.attn.bias": np.ones((1, 1, 16, 16), np.bool_), "h.1.attn.masked_bias": np.array(0, np.int8)}
    return single(d, raw, bare | more)


def llama_buffers(d: Path) -> Path:
    """And the value head of TRL's PPO."""
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.full(2, 3, np.float32)}
    more |= {"model.rotary_emb.original_inv_freq": np.full(2, 3, np.float32)}
    more |= {"v_head.summary.weight": np.ones((1, 12), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}
    return single(d, LLAMA, random_weights(LLAMA) | more)


def rotary_settings_that_are_not_read(d: Path) -> Path:
    """As YaRN's own code and multimodal models wrote them; a factor of 1 is none, and so is an mscale of 0."""
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "finetuned": True}
    rope |= {"mscale": 0.7, "mscale_all_dim": 0, "extrapolation_factor": 1, "attn_factor": 1.0, "mrope_section": [1, 1]}
    return single(d, LLAMA | {"rope_scaling": rope}, random_weights(LLAMA))


def rotary_settings_of_the_plain_kind(d: Path) -> Path:
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1], "factor": 1.0}
    return single(d, LLAMA | {"rope_theta": 500.0, "rope_scaling": rope}, random_weights(LLAMA))


def window_switched_off(d: Path) -> Path:
    """As programs write that turn a model of another family into a Llama."""
    off = {"use_sliding_window": False, "sliding_window": 2, "max_window_layers": 1}
    return single(d, LLAMA | off, random_weights(LLAMA))


def mistral_without_a_window(d: Path) -> Path:
    raw = LLAMA | {"model_type": "mistral", "sliding_window": None, "max_window_layers": 1}
    return single(d, raw, random_weights(raw))


def biases_that_the_family_has_always(d: Path) -> Path:
    raw = LLAMA | {"model_type": "qwen2", "qkv_bias": True, "attention_bias": True}
    return single(d, raw, random_weights(raw))


def norms_that_the_family_has_always(d: Path) -> Path:
    raw = LLAMA | {"model_type": "qwen3", "use_qk_norm": True, "hidden_act": "gelu_python", "is_causal": True}
    return single(d, raw, random_weights(raw))


READ_ALIKE = (
    tied_other_head,
    tied_head_alone,
    gpt2_other_head,
    neox_other_head,
    neox_head_under_its_new_name,
    prefix_too_little,
    prefix_too_much,
    single_and_old_index,
    single_and_damaged_index,
    left_over_shard,
    stored_in_an_earlier_shard_too,
    buffers,
    gpt2_buffers,
    llama_buffers,
    rotary_settings_that_are_not_read,
    rotary_settings_of_the_plain_kind,
    window_switched_off,
    mistral_without_a_window,
    biases_that_the_family_has_always,
    norms_that_the_family_has_always,
)


@pytest.mark.parametrize("make", READ_ALIKE, ids=lambda f: f.__name__)
def test_it_is_read_as_transformers_reads_it(make: Any, tmp_path: Path):
    assert_same_logits(make(tmp_path / "model"))


def test_a_head_that_differs_is_reported_and_stays_apart(tmp_path: Path, caplog: Any):
    directory = tied_other_head(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        model = load_model(directory)
    assert [r.getMessage() for r in caplog.records] == [
        f"ches: {directory}: config.json ties the head to the embedding (tie_word_embeddings), but 'lm_head.weight' "
        "and 'model.embed_tokens.weight' are both stored and differ: they are not tied, as in transformers"
    ]
    # what is written of it says so
    save_pretrained(model, tmp_path / "again", like=directory)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    stored, again = open_tensors(directory), open_tensors(tmp_path / "again")
    assert stored.keys() == again.keys() and all(same_values(stored[n], again[n]) for n in stored)


def test_a_quantised_config_of_weights_that_are_floats_is_reported(tmp_path: Path, caplog: Any):
    """A merged model under the config of the base that it was trained on."""
    raw = LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    tensors = random_weights(LLAMA)
    stored = open_checkpoint(single(tmp_path / "model", raw, tensors)).tensors["model.norm.weight"]
    np.testing.assert_array_equal(stored.read(), tensors["model.norm.weight"])
    assert "calls the weights quantised (fp8" in caplog.text and "read as they are stored" in caplog.text


def test_an_equal_head_in_another_dtype_stays_tied(tmp_path: Path):
    raw = LLAMA | {"tie_word_embeddings": True}
    tensors = random_weights(LLAMA)
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].astype(np.float16).astype(np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(np.float16)
    assert effective_config(single(tmp_path / "m", raw, tensors)) == raw
    tensors["lm_head.weight"][-1, -1] += 1  # the last of all values
    assert effective_config(single(tmp_path / "n", raw, tensors))["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("model.embed_tokens.weight", "lm_head.weight"),
    ],
)
def test_one_of_two_that_are_not_tied_is_refused_with_both_readings(gone: str, left: str, tmp_path: Path):
    tensors = random_weights(LLAMA)
    del tensors[gone]
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(single(tmp_path / "model", LLAMA, tensors))
    text = str(e.value)
    assert f"tensor '{gone}' is missing" in text and f"'{left}' is stored alone" in text
    assert "as tied" in text and "at random" in text


def test_the_old_index_beside_a_single_file_is_reported(tmp_path: Path, caplog: Any):
    directory = single_and_old_index(tmp_path / "model")
    assert weight_files(directory) == [directory / "model.safetensors"]
    assert "model.safetensors is read, as transformers does; model.safetensors.index.json beside it" in caplog.text
    # an index of the single file says nothing else
    caplog.clear()
    other = single(tmp_path / "other", LLAMA, random_weights(LLAMA))
    write(other, LLAMA, {}, {"model.norm.weight": "model.safetensors"})
    weight_files(other)
    assert not caplog.text


@pytest.mark.parametrize("weights_of_adapter", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_model_beside_an_adapter_is_refused(weights_of_adapter: str, tmp_path: Path):
    """transformers reads the adapter and its base, and not the weights beside them."""
    directory = single(tmp_path / "model", LLAMA, random_weights(LLAMA))
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    open_checkpoint(directory)
    (directory / weights_of_adapter).touch()
    with pytest.raises(CheckpointError, match=r"an adapter of 'some/base': transformers loads that base with the ada"):
        open_checkpoint(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a PEFT adapter of 'some/base' and no model; give that as --model"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.fp16.safetensors", "transformers reads none of these names either"),
        ("model-00001-of-00002.safetensors", "write the index of the shards"),
        ("pytorch_model.bin", "convert to safetensors first"),
    ],
)
def test_weights_under_other_names_are_listed(name: str, words: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=rf"no model.safetensors and .*found {name}: .*{words}"):
        open_checkpoint(write(tmp_path / "model", LLAMA, {name: random_weights(LLAMA)}))


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "default", "factor": 4.0}, "unknown key 'factor'"),
        ({"rope_type": "yarn", "factor": 4.0, "attn_factor": 2.0}, "unknown key 'attn_factor'"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 0.5}, "unknown key 'mscale'"),
    ],
)
def test_a_rotary_setting_that_is_not_read_and_not_off_is_refused(rope: dict[str, Any], words: str):
    assert words in message(LLAMA | {"rope_scaling": rope})


def test_a_setting_of_another_program_for_long_texts_is_not_read():
    raw = LLAMA | {"model_type": "qwen2"}
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    assert decoder_config(raw | {"dual_chunk_attention_config": chunks}) == decoder_config(raw)
    assert "'dual_chunk_attention_config'" in message(LLAMA | {"dual_chunk_attention_config": chunks})


def test_a_window_that_nobody_switches_off_is_refused():
    for more in ({}, {"use_sliding_window": True}):
        assert "'sliding_window' = 2" in message(LLAMA | {"sliding_window": 2} | more)
    assert "'max_window_layers' = 1" in message(
        LLAMA | {"model_type": "mistral", "sliding_window": 2, "max_window_layers": 1}
    )


def test_a_tensor_of_two_shards_that_differ_is_refused_where_index_and_transformers_differ(tmp_path: Path):
    tensors = random_weights(LLAMA)
    name, stale = "model.norm.weight", np.full(12, 7, np.float32)
    index = dict.fromkeys(tensors, "a.safetensors")
    files = {"a.safetensors": tensors, "b.safetensors": {name: stale, "lm_head.weight": tensors["lm_head.weight"]}}
    index["lm_head.weight"] = "b.safetensors"
    with pytest.raises(CheckpointError) as e:
        open_tensors(write(tmp_path / "model", LLAMA, files, index))
    assert str(e.value) == (
        f"{tmp_path / 'model'}: tensor 'model.norm.weight' is stored in a.safetensors and, with other values, in "
        "b.safetensors: the index assigns it to a.safetensors, and transformers reads b.safetensors; remove one of the "
        "two"
    )


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module."])
def test_a_wrapper_is_recognised_by_its_prefix(prefix: str, tmp_path: Path):
    tensors = {prefix + n: v for n, v in random_weights(LLAMA).items()}
    with pytest.raises(CheckpointError, match=f"all tensor names begin with '{prefix}'.*save the module inside"):
        open_checkpoint(single(tmp_path / "model", LLAMA, tensors))


def test_two_names_of_one_parameter_are_refused(tmp_path: Path):
    tensors = random_weights(LLAMA)
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' and 'norm.weight' are the same parameter"):
        open_checkpoint(single(tmp_path / "model", LLAMA, tensors))


def test_an_integer_that_is_no_buffer_is_still_refused(tmp_path: Path):
    tensors = random_weights(LLAMA)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.ones((12, 12), np.int8)
    with pytest.raises(CheckpointError, match=r"stored as int8.*quantization_config"):
        open_checkpoint(single(tmp_path / "model", LLAMA, tensors))
    assert not "transformer.h.0.attn.c_attn.bias".endswith(BUFFERS)


UNREAD = {
    "max_sequence_length": 2048,
    "model_max_length": 4096,
    "seq_length": 2048,
    "use_flash_attn": True,
    "tokenizer_padding_side": "left",
    "sequence_parallel": False,
    "attention_chunk_size": None,
    "unknown_scaling": {},
    "logit_scale": 1.0,
    "own_bias": False,
    "rotary_pct": 1.0,
    "fused_rms_norm": True,
    "layer_norm_eps": 1e-6,
    "n_layer": 2,
    "rope_base": 1e4,
    "layer_types": ["full_attention", "full_attention"],
}


def test_a_key_that_no_code_reads_is_named_once_and_changes_nothing(caplog: Any):
    written = LLAMA | {"rms_norm_eps": 1e-6, "rope_theta": 1e4}
    for _ in range(2):
        assert decoder_config(written | UNREAD, "models/unread") == decoder_config(written)
    assert len(caplog.records) == 1
    text = caplog.text
    assert all(f"'{key}'" in text for key, value in UNREAD.items() if value is not None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logit_scale", 0.5),
        ("logits_scaling", 8.0),
        ("residual_multiplier", 0.2),
        ("own_bias", True),
        ("sliding_window", 128),
        ("attention_chunk_size", 64),
        ("rotary_dim", 2),
        ("position_embedding_type", "alibi"),
        ("attnTemperatureTuning", True),
        ("embedding_scale", True),
        ("num_experts", 4),
        ("layer_types", ["full_attention", "linear_attention"]),
        ("final_norm", False),
        ("rotary_pct", 0.5),
        ("layer_norm_eps", 1e-3),
        ("n_layer", 3),
        ("n_layer", True),
        ("rotary_base", 500.0),
        ("is_causal", False),
        ("transformers_weights", "other.safetensors"),
    ],
)
def test_a_key_that_speaks_of_arithmetic_is_refused(key: str, value: Any):
    assert f"'{key}' = {value!r}" in message(LLAMA | {key: value})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 10**7, "should be at most 4096"),
        ("num_hidden_layers", 10**30, "should be at most 4096"),
        ("hidden_size", 2**31, "should be at most 2147483647"),
        ("vocab_size", 10**60, "a number of over 40 digits should be at most"),
        ("rms_norm_eps", float("nan"), "should be a finite number"),
        ("rms_norm_eps", 10**400, "should be of type float"),
        ("max_position_embeddings", -(10**50), "should be positive"),
    ],
)
def test_sizes_beyond_all_models_are_refused_at_once(key: str, value: Any, words: str):
    assert words in message(LLAMA | {key: value})


def test_gpt2_names_its_layers_otherwise_and_has_the_same_bound():
    assert "'n_layer' = 10000000 should be at most 4096" in message(family("gpt2", n_layer=10**7))
    for share in (2.0, 1e308):
        assert "not more than it has" in message(family("gpt_neox", rotary_pct=share))
