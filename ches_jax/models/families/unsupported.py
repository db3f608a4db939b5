"""Checkpoints that are not a decoder of a supported family, by name, and what to do with them."""

from collections.abc import Iterable, Mapping
from typing import Any

from ches_jax.hf.text_part import TEXT

GIVE = "give a decoder-only model of a supported type ({supported})"
MIXTURE = f"a mixture of experts of a kind whose routing this decoder does not have; {GIVE}"
MULTIMODAL = (
    "a multimodal model without a 'text_config' in its config.json that says what its text model is; give one that has "
    "it, around a text model of a supported type ({supported})"
)
OTHER_TEXT = (
    "a multimodal model around a text model of type {type!r}, which is not supported; give one whose text model is "
    "({supported})"
)
BENT_TEXT = (
    "a multimodal model whose text model does more than its config says (pictures reach into its layers, or a prefix "
    "is read in both directions); give a model whose text stands alone ({supported})"
)
ENCODER_DECODER = f"an encoder-decoder, which is not one sequence of tokens; {GIVE}"
ENCODER = f"an encoder, which does not predict the next token; {GIVE}"
RECURRENT = f"a state-space or recurrent model, which this decoder does not have; {GIVE}"
UNKNOWN = f"not supported; {GIVE}"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


KINDS: dict[str, frozenset[str]] = {
    MIXTURE: _words(
        "deepseek deepseek_v2 deepseek_v32 flex_olmo phimoe dbrx jetmoe granitemoe "
        "granitemoeshared ernie4_5_moe hunyuan_v1_moe minimax arctic grok-1 nllb_moe switch_transformers "
        "lfm2_moe dots1 longcat_flash"
    ),
    MULTIMODAL: _words(
        "gemma3 gemma3n gemma4 llava llava_next llava_next_video llava_onevision vipllava video_llava mllama llama4 "
        "qwen2_vl qwen2_5_vl qwen2_audio qwen2_5_omni qwen3_vl qwen3_vl_moe qwen3_omni_moe idefics idefics2 idefics3 "
        "smolvlm paligemma pixtral mistral3 internvl fuyu kosmos-2 blip blip-2 instructblip phi3_v phi4_multimodal "
        "chameleon emu3 janus aya_vision aria florence2 git molmo minicpmv deepseek_vl deepseek_vl_v2 clip siglip "
        "whisper"
    ),
    ENCODER_DECODER: _words(
        "t5 mt5 umt5 longt5 byt5 t5gemma bart mbart pegasus pegasus_x blenderbot blenderbot-small marian m2m_100 led "
        "prophetnet encoder-decoder bigbird_pegasus fsmt plbart mvp"
    ),
    ENCODER: _words(
        "bert roberta xlm-roberta xlm-roberta-xl distilbert albert electra deberta deberta-v2 modernbert camembert "
        "longformer big_bird mpnet ernie nomic_bert"
    ),
    RECURRENT: _words(
        "mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba zamba2 rwkv rwkv5 rwkv6 rwkv7 recurrent_gemma "
        "nemotron_h granitemoehybrid xlstm olmo_hybrid"
    ),
}
BENT = frozenset({"mllama", "paligemma", "idefics", "gemma3n", "t5gemma2"})
"""Multimodal types that are more than their text model with embeddings put in."""
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def unsupported_reason(raw: Mapping[str, Any], text: Mapping[str, Any], supported: Iterable[str]) -> str | None:
    """Why a config cannot become a decoder, or None where its family is one of ``supported``.

    Args:
      raw: the config.
      text: that of its text model; the same where there is no other.
      supported: types of text models.

    >>> unsupported_reason({"model_type": "bert"}, {"model_type": "bert"}, ["llama"]).partition(";")[0]
    "model_type 'bert' is an encoder, which does not predict the next token"
    """
    kind, known = raw.get("model_type"), sorted(supported)
    if str(kind) in BENT:
        return f"model_type {kind!r} is {BENT_TEXT.format(supported=', '.join(known))}"
    if text.get("model_type") in known:
        return None
    listed = ", ".join(known)
    if raw.get(TEXT) is not None:
        return f"model_type {kind!r} is {OTHER_TEXT.format(type=text['model_type'], supported=listed)}"
    if kind is None:
        return f"config.json has no 'model_type'; {GIVE.format(supported=listed)}"
    reason = next((reason for reason, kinds in KINDS.items() if str(kind) in kinds), None)
    return f"model_type {kind!r} is {(reason or _by_keys(raw)).format(supported=listed)}"


def _by_keys(raw: Mapping[str, Any]) -> str:
    """The reason for an unknown family, from the keys of its config."""
    if raw.get("is_encoder_decoder"):
        return ENCODER_DECODER
    if any(k in raw for k in ("vision_config", "audio_config")):
        return MULTIMODAL
    if any(raw.get(k) for k in EXPERT_KEYS):
        return MIXTURE
    return UNKNOWN
