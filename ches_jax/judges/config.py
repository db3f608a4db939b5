"""The options of ``ches judge``. Plain data: importing this module loads no jax."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ches_jax.errors import ChesError
from ches_jax.options import Columns, RowOptions, TemplateArgs, not_identity, require_dtype, require_positive
from ches_jax.runs.directory import new_name
from ches_jax.types import OnBadRow


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(RowOptions):
    """What to judge, and by whom.

    >>> JudgeConfig(responses="runs/g").by
    'rules'
    """

    responses: str
    """Directory of `ches generate`, or a file with columns text and prompt or row_id (and sample)."""
    by: Literal["rules", "model", "labels"] = "rules"
    """rules: sentences that decline (en, de, fr, es); model: a language model is asked; labels: taken from a file."""
    out: str | None = not_identity(None)
    """Run directory; default: the first free runs/judge-NNN."""

    rules: str | None = None
    """Phrases or patterns of your own; default: those of the package."""

    judge: str | None = None
    """The judge: Hugging Face model directory or hub name."""
    adapter: str | None = None
    """PEFT adapter (directory or hub name) of the judge."""
    judge_template: str | None = None
    """File with the question to the judge, with {prompt} and {response}; default: our wording."""
    wrap: Literal["auto", "chat", "inst", "none"] = "auto"
    """Around the question: the judge's chat template, [INST] ... [/INST], or nothing. auto: the chat template where
    there is one, else [INST]."""
    template_args: TemplateArgs = field(default_factory=dict)
    """Variables of the judge's chat template: enable_thinking=false; now=2024-07-26 stops its clock."""
    max_new_tokens: int = 50
    """Most tokens of the judge's answer."""
    dtype: str = "float32"
    """Dtype of the judge's computation: float32, bfloat16, float16 or float64."""
    batch_size: int = 16
    """Responses judged together."""
    mesh: str | None = not_identity(None)
    """Devices for the judge, such as data=4 or fsdp=8; default: all local devices on the data axis."""
    distributed: str = not_identity("off")
    """Several processes: auto (as the cluster says) or coordinator:port,n,id. Each takes chunks; then ches merge. On a
    mesh over all of them they judge together."""

    labels: str | None = None
    """File with refusal, score or label for each response, joined by row_id (or prompt) and sample."""
    label_columns: Columns = field(default_factory=dict)
    """Other names of its columns: label=verdict."""
    on_missing: Literal["error", "keep"] = "error"
    """What becomes of responses without a label: error, or keep (undecided)."""

    on_bad_row: OnBadRow = "error"
    """What becomes of rows without a response that can be read: error, drop (listed in dropped.jsonl) or keep
    (undecided)."""
    chunk_rows: int = 256
    """Responses per part file: what a killed run loses at most."""


NEEDS = {
    "rules": "rules",
    **dict.fromkeys(("judge", "adapter", "judge_template", "template_args"), "model"),
    "labels": "labels",
}
"""Option -> the way of judging it belongs to."""


def checked(config: JudgeConfig) -> JudgeConfig:
    """The config with a run directory.

    Raises:
      ChesError: the first option that no run can have.
    """
    for option, by in NEEDS.items():
        if getattr(config, option) not in (None, {}) and config.by != by:
            raise ChesError(f"--{option.replace('_', '-')} is for --by {by}, and this is --by {config.by}")
    if config.by == "model" and config.judge is None:
        raise ChesError("--by model: name the judge with --judge (a model directory or a hub name)")
    if config.by == "labels" and config.labels is None:
        raise ChesError("--by labels: name the file with --labels")
    require_dtype("dtype", config.dtype)
    numbers = {
        "max-new-tokens": config.max_new_tokens,
        "limit": config.limit,
        "batch-size": config.batch_size,
        "chunk-rows": config.chunk_rows,
    }
    require_positive(numbers)
    return replace(config, out=config.out or str(new_name(Path("runs"), "judge")))
