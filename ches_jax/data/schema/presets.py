"""Declarations for public preference data sets, and the sets that each reads.

A preset fits rows that have all its columns, with values that its declaration understands. To add one, add a row.
"""

from dataclasses import dataclass
from typing import Any

from ches_jax.data.schema.mapping import PLAIN, Schema, from_words


@dataclass(frozen=True)
class Preset:
    """A declaration by name."""

    schema: Schema
    sets: str
    """Public sets with this shape."""
    columns: tuple[str, ...]
    """All that a row must have; a dot reaches into objects."""


def _preset(name: str, sets: str, also: tuple[str, ...] = (), **words: Any) -> Preset:
    """``words`` without sides and responses: chosen and rejected."""
    sides = {} if {"responses", "chosen"} & words.keys() else {"chosen": "chosen", "rejected": "rejected"}
    schema = from_words({**words, **sides}, name)
    aside = {schema.category, schema.tools, schema.chat_template_kwargs}
    return Preset(schema, sets, tuple(dict.fromkeys([*(n for n in schema.reads if n not in aside), *also])))


PRESETS: dict[str, Preset] = {
    preset.schema.name: preset
    for preset in (
        Preset(
            PLAIN,
            "Anthropic/hh-rlhf, HuggingFaceH4/ultrafeedback_binarized, "
            "argilla/ultrafeedback-binarized-preferences-cleaned, argilla/dpo-mix-7k, "
            "allenai/llama-3.1-tulu-3-8b-preference-mixture, allenai/reward-bench, "
            "allenai/reward-bench-2, mlabonne/orpo-dpo-mix-40k, Skywork/Skywork-Reward-Preference-80K, "
            "princeton-nlp/llama3-ultrafeedback-armorm, Magpie-Align DPO sets, TRL's own",
            ("chosen", "rejected"),
        ),
        _preset("orca-dpo", "Intel/orca_dpo_pairs", system="system", prompt="question"),
        _preset("distilabel-orca", "argilla/distilabel-intel-orca-dpo-pairs", system="system", prompt="input"),
        _preset("alpaca", "LLaMA-Factory's alpaca format", prompt="instruction", input="input"),
        _preset(
            "alpaca-system",
            "the same with system texts (and `history`)",
            system="system",
            prompt="instruction",
            input="input",
        ),
        _preset("sharegpt", "LLaMA-Factory's sharegpt format", prompt="conversations"),
        _preset("messages", "axolotl's chat_template format", prompt="messages"),
        _preset(
            "swift",
            "ms-swift's messages with a rejected_response",
            chosen="messages",
            rejected="rejected_response",
        ),
        _preset(
            "openai",
            "OpenAI's preference format (Azure, Together, Fireworks)",
            prompt="input.messages",
            tools="input.tools",
            chosen="preferred_output",
            rejected="non_preferred_output",
        ),
        _preset(
            "ultrafeedback",
            "openbmb/UltraFeedback",
            prompt="instruction",
            responses="completions.response",
            scores="completions.overall_score",
        ),
        _preset("nectar", "berkeley-nest/Nectar", prompt="prompt", responses="answers.answer", ranks="answers.rank"),
        _preset("ranked-replies", "OASST-style sets, NeMo-RL", prompt="prompt", responses="replies", ranks="ranks"),
        _preset(
            "summarize-from-feedback",
            "openai/summarize_from_feedback (comparisons)",
            prompt="info.post",
            responses="summaries.text",
            winner="choice",
            order=["from 0"],
        ),
        _preset(
            "webgpt",
            "openai/webgpt_comparisons",
            prompt="question.full_text",
            responses=["answer_0", "answer_1"],
            scores=["score_0", "score_1"],
        ),
        _preset(
            "pku-saferlhf",
            "PKU-Alignment/PKU-SafeRLHF (by better_response_id)",
            prompt="prompt",
            responses=["response_0", "response_1"],
            winner="better_response_id",
            order=["0", "1"],
        ),
        _preset(
            "shp",
            "stanfordnlp/SHP (labels 1: A is better)",
            prompt="history",
            responses=["human_ref_A", "human_ref_B"],
            winner="labels",
            order=["1", "0"],
        ),
        _preset(
            "helpsteer3",
            "nvidia/HelpSteer3 (negative: response1 is better)",
            prompt="context",
            responses=["response1", "response2"],
            winner="overall_preference",
            order=["negative", "positive"],
        ),
        _preset(
            "helpsteer2-preference",
            "nvidia/HelpSteer2, preference (negative: response_1 is better)",
            prompt="prompt",
            responses=["response_1", "response_2"],
            winner="preference_strength",
            order=["negative", "positive"],
        ),
        _preset(
            "helpsteer2",
            "nvidia/HelpSteer2 (by helpfulness)",
            ("correctness", "coherence"),
            prompt="prompt",
            responses="response",
            scores="helpfulness",
            group="prompt",
        ),
        _preset(
            "chatbot-arena",
            "lmsys/chatbot_arena_conversations",
            responses=["conversation_a", "conversation_b"],
            winner="winner",
            order=["model_a", "model_b"],
        ),
        _preset(
            "arena-55k",
            "lmarena-ai/arena-human-preference-55k",
            prompt="prompt",
            responses=["response_a", "response_b"],
            winners=["winner_model_a", "winner_model_b"],
            tie="winner_tie",
        ),
    )
}
