"""What does not fit is refused by name, all of it in one message, with what to do."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ches_jax.errors import CheckpointError
from ches_jax.models.checkpoint.load import load_model, open_checkpoint
from ches_jax.models.decoder import abstract_parameters
from ches_jax.models.families.registry import FAMILIES, decoder_config
from ches_jax.models.stacks import layers_of

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
}


GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 12, "n_layer": 2, "n_head": 3}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 6}
SQUARE = {"num_key_value_heads": 3, "head_dim": 4}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt_neox": {"hidden_size": 24},
    "cohere2": SQUARE,
    "olmoe": {**SQUARE, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "decoder_sparse_step": 2},
    "qwen2_moe": {**SQUARE, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 5},
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 5},
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 5},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 14, "interleave_moe_layer_step": 2},
    "gemma4_text": {
        "num_key_value_heads": 3,
        "head_dim": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 40,
    },
    "deepseek_v3": {
        **EXPERTS,
        "q_lora_rank": 7,
        "kv_lora_rank": 5,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
"""What a tiny config of a family has besides the sizes of all, where that is not ``head_dim``."""

GEMMA4_LENT = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}


def family(kind: str, **extra: Any) -> dict[str, Any]:
    """A tiny config of any family."""
    if kind == "gpt2":
        return {**GPT2, **extra}
    sizes = {} if kind in {"gpt_neox", "deepseek_v3"} else {"num_key_value_heads": 3, "head_dim": 8}
    return {**TINY, "model_type": kind, **sizes, **OWN.get(kind, {}), **extra}


def message(raw: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as e:
        decoder_config(raw, "models/x")
    return str(e.value)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_key_nobody_handles_is_named(kind: str):
    decoder_config(family(kind))
    assert "'logit_bend' = 3" in message(family(kind, logit_bend=3))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_null_key_is_absent(kind: str):
    assert decoder_config(family(kind, logit_bend=None)) == decoder_config(family(kind))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("llama", "rope_interleaved", True),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "is_encoder_decoder", True),
        ("llama", "pruned_heads", {"0": [1]}),
        ("qwen2", "use_mrope", True),
        ("gemma", "use_bidirectional_attention", True),
        ("gemma", "hidden_activation", "relu"),
        ("gemma2", "sliding_window_size", 5),
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt_neox", "partial_rotary_factor", 0.5),
        ("gpt_neox", "rope_theta", 5e5),
        ("phi3", "attention_bias", True),
        ("starcoder2", "mlp_type", "gated"),
    ],
)
def test_a_key_off_its_supported_value_is_named(kind: str, key: str, value: Any):
    text = message(family(kind, **{key: value}))
    assert repr(key) in text
    assert "not supported" in text


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"hidden_act": "mish"}, "unknown activation"),
        ({"rms_norm_eps": "small"}, "should be of type float"),
        ({"num_hidden_layers": True}, "should be of type int"),
        ({"num_attention_heads": 0}, "should be positive"),
        ({"num_key_value_heads": 2}, "not a multiple"),
        ({"head_dim": 5}, "expected an even number"),
        ({"rope_scaling": [4]}, "should be of type dict"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "unknown rope type 'spiral'"),
        ({"rope_scaling": {"type": ["yarn"]}}, "unknown rope type"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "'factor' = '4'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "turn": 1}}, "unknown key 'turn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}}, "rotate whole"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1, 2]}},
            "has 1 numbers; expected 2",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 5, "high_freq_factor": 4}},
            "should not be above high_freq_factor",
        ),
    ],
)
def test_values_that_cannot_be(extra: dict[str, Any], words: str):
    assert words in message(TINY | extra)


@pytest.mark.parametrize(
    ("kind", "extra", "words"),
    [
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "switched off"),
        ("qwen3", {"layer_types": ["full_attention"]}, "should list 2 of"),
        ("gemma2", {"layer_types": ["full_attention", {}]}, "should list 2 of"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "soft cap of the logits"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "should be positive"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "'full_attention' and 'sliding_attention'"),
        ("olmo", {"clip_qkv": -1.0}, "clip of queries"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "not one of this family"),
        ("olmo3", {"rope_theta": 1e4}, "read as the base of all layers, or"),
        ("olmo3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "they say something else"),
        ("smollm3", {"no_rope_layers": [1]}, "should list 2 of 0, 1"),
        ("smollm3", {"layer_types": ["sliding_attention", "full_attention"]}, "switched off"),
        ("ministral3", {"rope_parameters": {"rope_type": "default"}}, "'llama_4_scaling_beta' = None"),
        ("granite", {"logits_scaling": 0}, "should be positive"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 experts for a token of 4"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, "should list layers from 0 to 1"),
        ("qwen3_moe", {"num_local_experts": 5}, "names of one number"),
        ("deepseek_v3", {"n_group": 3}, "equal groups of at least two experts"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "supported: 'sigmoid'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "supported: 'noaux_tc'"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "a layer of each type among them"),
        ("gemma4_text", {"num_kv_shared_layers": -1}, "expected fewer than"),
        ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 4}}}, "of the full layers ([1])"),
        ("gemma4_text", {"per_layer_config": {"1": {"mlp": 4}}}, "of the full layers ([1])"),
        ("gemma4_text", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "lacks the settings of sliding"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "supported: 'vision'"),
        ("gemma4_text", {"enable_moe_block": True}, "'num_experts' is missing"),
        ("gemma4_text", {"vocab_size_per_layer_input": 5}, "a row for every token"),
        ("llama4_text", {"layer_types": ["sliding_attention", "full_attention"]}, "should list 2 of"),
        ("gpt2", {"n_head": 5}, "not a multiple of 'n_head'"),
    ],
)
def test_values_that_cannot_be_in_a_family(kind: str, extra: dict[str, Any], words: str):
    assert words in message(family(kind, **extra))


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if "experts" in str(family(kind))])
@pytest.mark.parametrize("key", ["scoring_func", "routing_function", "router_type", "topk_method", "gating"])
def test_a_routing_that_is_not_the_family_s_is_refused(kind: str, key: str):
    assert f"{key!r} = 'sinkhorn'" in message(family(kind, **{key: "sinkhorn"}))


def test_all_problems_come_together():
    raw = {k: v for k, v in TINY.items() if k != "vocab_size"}
    text = message(raw | {"hidden_act": "mish", "logit_bend": 3, "rope_scaling": {"type": "spiral"}})
    assert text.startswith("models/x: 4 problems")
    for word in ("'vocab_size' is missing", "mish", "logit_bend", "spiral"):
        assert word in text


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model_type": "dbrx"}, "mixture of experts"),
        ({"model_type": "jetmoe"}, "mixture of experts"),
        ({"model_type": "deepseek_v2"}, "mixture of experts"),
        ({"model_type": "new_moe", "num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "gemma3", "text_config": {}}, "describes no text model"),
        ({"model_type": "gemma3", "vision_config": {}}, "without a 'text_config'"),
        ({"model_type": "gemma3", "text_config": None}, "without a 'text_config'"),
        ({"model_type": "new_eyes", "text_config": {"model_type": "bert"}}, "text model of type 'bert'"),
        ({"model_type": "mllama", "text_config": {"model_type": "llama"}}, "does more than its config says"),
        # with a 'text_config' it would be refused again: no word of adding one
        ({"model_type": "mllama"}, "does more than its config says"),
        ({"model_type": "gemma3n", "vision_config": {}}, "does more than its config says"),
        ({"model_type": "qwen2_vl"}, "multimodal"),
        ({"model_type": "new_eyes", "vision_config": {}}, "multimodal"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "new_t", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "bert"}, "an encoder"),
        ({"model_type": "mamba"}, "state-space"),
        (
            {"model_type": "unheard_of"},
            "not supported; give a decoder-only model of a supported type (cohere2, deepseek_v3,",
        ),
        ({"model_type": ["llama"]}, "not supported"),
        ({}, "no 'model_type'"),
        (TINY | {"quantization_config": {"quant_method": "hqq"}}, "'hqq'"),
        (TINY | {"quantization_config": {"bits": 4}}, "no 'quant_method'"),
        (TINY | {"quantization_config": {}}, "no 'quant_method'"),
    ],
)
def test_other_kinds_of_model_are_refused_by_name(raw: dict[str, Any], words: str):
    text = message(raw)
    assert words in text
    assert "give " in text
    assert "\n" not in text


def weights(raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """Zeros for every tensor of the config's file."""
    config = decoder_config(raw)
    shapes = abstract_parameters(config)
    out = {}
    for rule in FAMILIES[raw["model_type"]].name_rules(shapes, config):
        shape = shapes[rule.param].shape
        for name in rule.names(shape, layers_of(config, rule.param)).values():
            out[name] = np.zeros(rule.view.tensor_shape(shape[rule.lead :]), np.float32)
    return out


def test_every_tensor_and_every_parameter_is_accounted_for(write_model: Any):
    tensors = weights(TINY)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(13, np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(12, np.float32)
    with pytest.raises(CheckpointError) as e:
        load_model(write_model(TINY, tensors))
    text = str(e.value)
    assert "3 problems" in text
    assert "'model.layers.1.mlp.up_proj.weight' is missing" in text
    assert "'model.norm.weight' has shape (13,)" in text
    assert "'model.layers.0.self_attn.q_proj.bias' matches no parameter" in text


@pytest.mark.parametrize(
    ("kind", "stored", "said", "words"),
    [
        ("lfm2", {"layer_types": ["conv"] * 2}, {"layer_types": ["full_attention", "conv"]}, "attention in layers 0, "),
        ("lfm2", {"layer_types": ["full_attention"] * 2}, {"layer_types": ["conv"] * 2}, "short conv in layers 0, 1, "),
        ("qwen3_moe", {"decoder_sparse_step": 2}, {"decoder_sparse_step": 1}, "a routed MLP in layers 0, "),
        ("llama", {"num_hidden_layers": 1}, {"num_hidden_layers": 2}, "attention in layers 1, "),
    ],
)
def test_a_kind_of_layer_without_weights_is_one_line(
    kind: str, stored: dict[str, Any], said: dict[str, Any], words: str, write_model: Any
):
    sizes = {"block_multiple_of": 8} if kind == "lfm2" else {}
    with pytest.raises(CheckpointError) as e:
        load_model(write_model(family(kind, **sizes, **said), weights(family(kind, **sizes, **stored))))
    text = str(e.value)
    assert words in text and "none of its weights (" in text
    assert ("of another kind of layer" in text) == (kind != "llama")
    # one line where tensors of that kind alone are missing
    assert "is missing" not in text or kind == "llama"
    assert "matches no parameter" not in text


def test_a_fused_tensor_has_the_shape_of_its_parts_together(write_model: Any):
    raw = family("phi3")
    tensors = weights(raw)
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = np.zeros((71, 12), np.float32)
    with pytest.raises(CheckpointError, match=r"has shape \(71, 12\); config.json asks for \(72, 12\)"):
        load_model(write_model(raw, tensors))


def test_a_tied_head_stored_twice_is_no_extra(write_model: Any):
    raw = TINY | {"tie_word_embeddings": True}
    tensors = weights(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert load_model(write_model(raw, tensors)).lm_head is None


def test_buffers_of_old_checkpoints_are_no_extras(write_model: Any):
    raw = family("gpt_neox")
    tensors = weights(raw)
    tensors["gpt_neox.layers.0.attention.bias"] = np.zeros((1, 1, 16, 16), np.float32)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = np.zeros((), np.float32)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.zeros((1,), np.float32)
    load_model(write_model(raw, tensors))


@pytest.mark.parametrize(("kind", "prefix"), [("gpt2", "transformer."), ("gemma", "model.")])
def test_a_file_of_the_model_without_its_head_loads(kind: str, prefix: str, write_model: Any):
    raw = family(kind)
    tensors = {name.removeprefix(prefix): value for name, value in weights(raw).items()}
    if kind == "gpt2":
        tensors["h.0.attn.bias"] = np.zeros((1, 1, 16, 16), np.float32)
    load_model(write_model(raw, tensors))


def test_a_missing_head_is_missed(write_model: Any):
    tensors = {name.removeprefix("model."): value for name, value in weights(TINY).items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        load_model(write_model(TINY, tensors))


def test_no_family_reads_a_missing_size_from_thin_air():
    for kind in FAMILIES:
        assert "missing" in message({"model_type": kind})


def test_config_is_read_from_the_file(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dbrx"}))
    with pytest.raises(CheckpointError, match="mixture of experts"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "extra", "names", "reason"),
    [
        ("deepseek_v3", {}, ("model.layers.2.mlp.up_proj.weight", "model.layers.2.eh_proj.weight"), "several tokens"),
        ("gemma4_text", GEMMA4_LENT, ("model.layers.3.self_attn.k_norm.weight",), "borrow them"),
    ],
)
def test_what_checkpoints_hold_and_no_model_reads_is_left_out_by_name(
    kind: str, extra: dict[str, Any], names: tuple[str, ...], reason: str, write_model: Any, caplog: Any
):
    raw = family(kind, **extra)
    open_checkpoint(write_model(raw, weights(raw) | {name: np.zeros(3, np.float32) for name in names}))
    assert f"{len(names)} tensors are left out" in caplog.text
    assert reason in caplog.text


def test_the_page_of_families_lists_those_of_the_registry():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert [name for name in listed if name != "model_type"] == sorted(FAMILIES)
