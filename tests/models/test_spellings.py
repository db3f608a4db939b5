"""Older and newer names of the same settings, and null against absent."""

from typing import Any

import pytest

from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.registry import decoder_config

from .test_strict import family

LONG = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}


def read(kind: str, **extra: Any) -> DecoderConfig:
    return decoder_config(family(kind, **extra))


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
        ),
        (
            "gpt_neox",
            {"rotary_pct": 0.5, "rotary_emb_base": 300},
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 300.0}},
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "su", **LONG}, "original_max_position_embeddings": 8},
            {"rope_parameters": {"rope_type": "longrope", **LONG}, "original_max_position_embeddings": 8},
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "yarn", **LONG}, "original_max_position_embeddings": 8},
            {"rope_parameters": {"rope_type": "longrope", **LONG}, "original_max_position_embeddings": 8},
        ),
        (
            "gemma3_text",
            {
                "rope_theta": 2e6,
                "rope_local_base_freq": 3e4,
                "sliding_window_pattern": 2,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            {
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
                },
            },
        ),
        ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_new"}),
    ],
)
def test_old_and_new_names_mean_the_same(kind: str, old: dict[str, Any], new: dict[str, Any]):
    assert read(kind, **old) == read(kind, **new)
    assert read(kind, **old) != read(kind) or kind == "gemma"


def test_null_is_off_and_absent_is_the_default():
    assert read("mistral").windows == (4096, 4096)
    assert read("mistral", sliding_window=None).windows == (None, None)
    assert read("gemma2").logit_softcap == 30.0
    assert read("gemma2", final_logit_softcapping=None).logit_softcap is None


def test_layers_that_are_not_listed_slide_as_their_family_says():
    assert read("gemma2", num_hidden_layers=4, sliding_window=7).windows == (7, None, 7, None)
    assert read("cohere2", num_hidden_layers=4, sliding_window=7).windows == (7, 7, 7, None)


def test_the_context_of_training_beside_the_dictionary_counts():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    rope = read("llama", rope_scaling=scaling, original_max_position_embeddings=8).rope
    assert rope is not None
    assert rope.original_max_positions == 8
