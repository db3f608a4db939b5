"""One row for each family: how to make a tiny model of it with transformers, and what else can be set.

Sizes are distinct and odd where they can be, so that no transposition or mixed-up head can hide.
"""

from dataclasses import dataclass, field
from typing import Any

TOKENS = 32
"""Length of the sequences: more than the windows, and more than the context of ``dynamic`` and ``longrope``."""
LONG = {"max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 3.0, 7.0],
}  # fmt: skip
GROWTH = {"llama_4_scaling_beta": 0.3, "rope_theta": 10000.0}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 23}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 19},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn_attention_factor": {"rope_parameters": {**YARN, "attention_factor": 1.7, "truncate": False}},
    "yarn_mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 4, "beta_slow": 2}},
}


@dataclass(frozen=True)
class Row:
    """A family: its name in transformers, the arguments of a tiny config, and variants of it."""

    family: str
    config: str
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    tolerance: float = 2e-6
    """Of float32, ours and that of transformers: where its own float32 is further from float64, more."""


SIZES = {"vocab_size": 101, "num_hidden_layers": 3, "intermediate_size": 73, **LONG}
WIDE = {**SIZES, "hidden_size": 63, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10}
"""Width 63, queries 90 wide, keys 30."""
SQUARE = {**SIZES, "hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3}
"""Heads of 6 channels that make up the width."""

DELTA = WIDE | {
    "num_hidden_layers": 5, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 5, "linear_value_head_dim": 7,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"],
}  # fmt: skip

ROWS = (
    Row("llama", "LlamaConfig", WIDE, {
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3, "hidden_act": "gelu"},
        "one_kv_head": {"num_key_value_heads": 1, "hidden_act": "relu"},
        **ROPES,
    }),
    Row("mistral", "MistralConfig", {**WIDE, "sliding_window": 7}, {
        "no_window": {"sliding_window": None, "tie_word_embeddings": True},
    }),
    Row("qwen2", "Qwen2Config", WIDE | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, {
        "unused_window": {"use_sliding_window": False, "tie_word_embeddings": True},
        "layer_types": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "yarn": ROPES["yarn"],
    }),
    Row("qwen3", "Qwen3Config", WIDE, {
        "biases": {"attention_bias": True, "tie_word_embeddings": True},
        "windows": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        "yarn": ROPES["yarn"],
    }),
    Row("gemma", "GemmaConfig", WIDE, {
        "untied": {"tie_word_embeddings": False, "attention_bias": True},
    }),
    Row("gemma2", "Gemma2Config", WIDE | {
        "sliding_window": 7, "query_pre_attn_scalar": 13, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
    }, {
        "no_caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
        "layer_types": {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    }),
    Row("gemma3_text", "Gemma3TextConfig", WIDE | {
        "num_hidden_layers": 4, "sliding_window": 7, "query_pre_attn_scalar": 13, "sliding_window_pattern": 3,
    }, {
        "capped": {"final_logit_softcapping": 4.0, "tie_word_embeddings": False, "attention_bias": True},
        "linear": {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        }},
    }),
    Row("olmo", "OlmoConfig", SQUARE, {
        "clipped": {"clip_qkv": 0.4, "tie_word_embeddings": True},
        "biases": {"attention_bias": True, "head_dim": 10},
    }),
    Row("olmo2", "Olmo2Config", SQUARE, {
        "biases": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 10},
        "yarn": ROPES["yarn"],
    }),
    Row("gpt2", "GPT2Config", {
        "vocab_size": 101, "n_positions": 37, "n_embd": 54, "n_head": 9, "n_layer": 3, "n_inner": 73,
    }, {
        "untied": {"tie_word_embeddings": False, "n_inner": None},
        "unscaled": {"scale_attn_weights": False, "activation_function": "relu"},
        "upcast": {"reorder_and_upcast_attn": True},
    }),
    Row("gpt_neox", "GPTNeoXConfig", {
        **SIZES, "hidden_size": 72, "num_attention_heads": 9,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }, {
        "sequential": {"use_parallel_residual": False, "attention_bias": False},
        "tied": {"tie_word_embeddings": True, "hidden_act": "gelu_fast"},
        "dynamic": {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.75},
            "max_position_embeddings": 19,
        },
    }),
    Row("phi3", "Phi3Config", SQUARE | {"sliding_window": 7, "pad_token_id": 0}, {
        "partial": {
            "hidden_size": 72, "sliding_window": None, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
        "long": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
        "short": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40},
        "long_attention_factor": {
            "rope_parameters": {**LONGROPE, "attention_factor": 1.3}, "original_max_position_embeddings": 16,
        },
    }),
    Row("starcoder2", "Starcoder2Config", {**SQUARE, "sliding_window": 7}, {
        "no_biases": {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False},
    }),
    Row("lfm2", "Lfm2Config", {
        **SQUARE, "num_hidden_layers": 5, "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
        "block_multiple_of": 7, "conv_L_cache": 4,
    }, {
        "biases": {"conv_bias": True, "conv_L_cache": 2, "tie_word_embeddings": False},
        "listed": {"layer_types": None, "full_attn_idxs": [0, 2], "block_auto_adjust_ff_dim": False},
        "multiplied": {"block_ffn_dim_multiplier": 1.7, "conv_L_cache": 1},
    }, tolerance=5e-6),
    Row("qwen3_5_text", "Qwen3_5TextConfig", DELTA, {
        "biases": {"attention_bias": True, "tie_word_embeddings": True, "linear_conv_kernel_dim": 2},
        "equal_heads": {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 6},
        "whole_rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    }, tolerance=1e-4),
    Row("olmo3", "Olmo3Config", {**SQUARE, "num_hidden_layers": 4, "sliding_window": 7}, {
        "biases": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 10},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "yarn": {"rope_parameters": {
            "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
        }},
    }),
    Row("smollm3", "SmolLM3Config", WIDE | {"no_rope_layer_interval": 2, "pad_token_id": 0}, {
        "listed": {"no_rope_layers": [0, 1, 1], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        "windows": {"use_sliding_window": True, "sliding_window": 7},
        "yarn": ROPES["yarn"],
    }),
    Row("glm4", "Glm4Config", WIDE | {"head_dim": 12, "pad_token_id": 0}, {
        "no_biases": {"attention_bias": False, "tie_word_embeddings": True},
        "whole": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 1.0}},
    }),
    Row("granite", "GraniteConfig", WIDE | {
        "embedding_multiplier": 5.0, "residual_multiplier": 0.3, "attention_multiplier": 0.4, "logits_scaling": 3.0,
    }, {
        "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "off": {"residual_multiplier": 1.0, "embedding_multiplier": 1, "rope_parameters": LLAMA3},
    }),
    Row("cohere2", "Cohere2Config", {**SQUARE, "num_hidden_layers": 4, "sliding_window": 7, "logit_scale": 0.3}, {
        "untied": {"tie_word_embeddings": False, "attention_bias": True},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention"] * 2, "rope_parameters": LLAMA3},
    }),
    Row("ministral3", "Ministral3Config", WIDE | {
        "pad_token_id": 0, "rope_parameters": {**YARN, "original_max_position_embeddings": 5, **GROWTH},
    }, {
        "windows": {"sliding_window": 7, "tie_word_embeddings": True},
        "plain": {"rope_parameters": {"rope_type": "default", "original_max_position_embeddings": 9, **GROWTH}},
    }),
    Row("mixtral", "MixtralConfig", WIDE | {"num_local_experts": 5, "num_experts_per_tok": 2}, {
        "windows": {"sliding_window": 7, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    }),
    Row("qwen3_moe", "Qwen3MoeConfig", WIDE | {**EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True}, {
        "some_dense": {"mlp_only_layers": [1], "decoder_sparse_step": 1, "norm_topk_prob": False},
        "windows": {"use_sliding_window": True, "sliding_window": 7, "attention_bias": True},
    }),
    Row("qwen2_moe", "Qwen2MoeConfig", {**SQUARE, **EXPERTS, "shared_expert_intermediate_size": 19}, {
        "some_dense": {"mlp_only_layers": [1], "norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True},
        "windows": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "decoder_sparse_step": 2},
    }),
    Row("qwen3_next", "Qwen3NextConfig", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 19}, {
        "some_dense": {"mlp_only_layers": [1], "norm_topk_prob": False, "tie_word_embeddings": True},
        "biases": {"attention_bias": True, "decoder_sparse_step": 2, "linear_conv_kernel_dim": 2},
    }, tolerance=1e-4),
    Row("qwen3_5_moe_text", "Qwen3_5MoeTextConfig", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 19}, {
        "biases": {"attention_bias": True, "tie_word_embeddings": True, "num_experts_per_tok": 1},
    }, tolerance=1e-4),
    Row("glm4_moe", "Glm4MoeConfig", WIDE | {
        "head_dim": 12, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 23, "n_group": 2,
        "routed_scaling_factor": 1.7,
    }, {
        "normed": {"use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2, "tie_word_embeddings": True},
        "dense": {"first_k_dense_replace": 2, "norm_topk_prob": False, "n_group": 1, **ROPES["yarn"]},
    }),
    Row("olmoe", "OlmoeConfig", {**SQUARE, "intermediate_size": 23, "num_experts": 5, "num_experts_per_tok": 3}, {
        "clipped": {"clip_qkv": 0.4, "norm_topk_prob": True},
        "biases": {"attention_bias": True, "tie_word_embeddings": True},
    }),
    Row("gpt_oss", "GptOssConfig", WIDE | {
        "intermediate_size": 23, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7,
        "rope_parameters": {**YARN, "truncate": False},
    }, {
        "no_biases": {"attention_bias": False, "tie_word_embeddings": True, "swiglu_limit": 0.5, "swiglu_alpha": 1.2},
        "layer_types": {"layer_types": ["full_attention", "full_attention", "sliding_attention"], **ROPES["linear"]},
    }),
    Row("deepseek_v3", "DeepseekV3Config", {
        **SIZES, "hidden_size": 63, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 24,
        "kv_lora_rank": 18, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8,
        "n_group": 2, "topk_group": 1,
        "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 23, "first_k_dense_replace": 1,
    }, {
        "plain_queries": {"q_lora_rank": None, "attention_bias": True, "v_head_dim": 12, "rope_interleave": False},
        "unscaled": {
            "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        },
        "yarn": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, "first_k_dense_replace": 3},
    }, tolerance=5e-6),
    Row("llama4_text", "Llama4TextConfig", WIDE | {
        "num_hidden_layers": 4, "intermediate_size": 23, "intermediate_size_mlp": 73, "num_local_experts": 4,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 8, "floor_scale": 5, "attn_scale": 0.7,
    }, {
        "two": {"num_experts_per_tok": 2, "use_qk_norm": False, "attention_bias": True, "moe_layers": [0]},
        "no_chunks": {
            "attention_chunk_size": None, "attn_temperature_tuning": False, "no_rope_layers": [1, 0, 1, 0],
            "tie_word_embeddings": True, "rope_parameters": LLAMA3,
        },
    }),
    Row("gemma4_text", "Gemma4TextConfig", WIDE | {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 7,
        "global_head_dim": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 5,
        "vocab_size_per_layer_input": 101,
    }, {
        "wide": {"use_double_wide_mlp": True, "tie_word_embeddings": False, "attention_bias": True},
        "experts": {
            "enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 23,
            "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
            "num_global_key_value_heads": 1, "final_logit_softcapping": 4.0,
        },
    }, 2e-5),  # scores are not scaled down, so that rounding in float32 is larger, there and here
)  # fmt: skip
