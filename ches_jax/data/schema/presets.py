"""Published preference data whose columns do not tell by themselves how they are meant; most need no preset.

A preset is what a user's own schema file is. It is taken where the data have all columns it reads.
"""

from ches_jax.data.schema.schema import TIE, Schema

PRESETS: tuple[Schema, ...] = (
    Schema(
        "helpsteer3",
        "nvidia/HelpSteer3, preference: below 0 the first response is better",
        prompt=("context",),
        responses=("response1", "response2"),
        winner="overall_preference",
        winner_is={"negative": 0, "positive": 1, "zero": TIE},
    ),
    Schema(
        "helpsteer2_preference",
        "nvidia/HelpSteer2, preference: below 0 the first response is better",
        prompt=("prompt",),
        responses=("response_1", "response_2"),
        winner="preference_strength",
        winner_is={"negative": 0, "positive": 1, "zero": TIE},
    ),
    Schema(
        "helpsteer2",
        "nvidia/HelpSteer2: rows after one another share a prompt; by helpfulness",
        prompt=("prompt",),
        responses=("response",),
        scores=("helpfulness",),
        group=True,
        ignore=("correctness", "coherence", "complexity", "verbosity"),
    ),
    Schema(
        "pku_saferlhf",
        "PKU-Alignment/PKU-SafeRLHF: by better_response_id (safer_response_id is the other label)",
        prompt=("prompt",),
        responses=("response_0", "response_1"),
        winner="better_response_id",
        winner_is={"0": 0, "1": 1},
        ignore=("safer_response_id", "is_response_0_safe", "is_response_1_safe"),
    ),
    Schema(
        "pku_beavertails_preference",
        "PKU-Alignment/PKU-SafeRLHF-single-dimension and the like: by better_response_id",
        prompt=("prompt",),
        responses=("response_0", "response_1"),
        winner="better_response_id",
        winner_is={"0": 0, "1": 1},
    ),
    Schema(
        "shp",
        "stanfordnlp/SHP: labels is 1 where A is preferred, 0 where B is",
        prompt=("history",),
        responses=("human_ref_A", "human_ref_B"),
        winner="labels",
        winner_is={"1": 0, "0": 1},
        ignore=("score_A", "score_B", "score_ratio"),
    ),
    Schema(
        "arena_55k",
        "lmarena-ai/arena-human-preference-55k: JSON lists of turns, one column for each outcome",
        prompt=("prompt",),
        responses=("response_a", "response_b"),
        one_hot=("winner_model_a", "winner_model_b"),
        turns=True,
        ignore=("winner_tie",),
    ),
    Schema(
        "ultrafeedback",
        "openbmb/UltraFeedback: by overall_score",
        prompt=("instruction",),
        responses=("completions.response",),
        scores=("completions.overall_score",),
    ),
    Schema(
        "nectar",
        "berkeley-nest/Nectar: rank 1 is best",
        prompt=("prompt",),
        responses=("answers.answer",),
        ranks=("answers.rank",),
    ),
    Schema(
        "summarize_from_feedback",
        "openai/summarize_from_feedback, comparisons: choice is the number of the better summary",
        prompt=("info.post",),
        responses=("summaries.text",),
        winner="choice",
        winner_is={"0": 0, "1": 1},
    ),
    Schema(
        "webgpt_comparisons",
        "openai/webgpt_comparisons: the higher score",
        prompt=("question.full_text",),
        responses=("answer_0", "answer_1"),
        scores=("score_0", "score_1"),
    ),
)
"""In the order in which they are tried: one that reads more columns comes before one that reads fewer of the same."""
