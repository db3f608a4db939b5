"""The options of ``ches label``. Plain data: importing this module loads no jax."""

from dataclasses import MISSING, dataclass, fields
from typing import Literal

from ches_jax.errors import ChesError
from ches_jax.options import ModelOptions, PairOptions, not_identity, require_dtype, require_positive
from ches_jax.types import OnBadRow


@dataclass(frozen=True, kw_only=True)
class LabelConfig(PairOptions, ModelOptions):
    """What to label, and by what.

    >>> LabelConfig(by="follow-up", phrases="phrases.txt", out="labelled").beta
    0.1
    """

    out: str = not_identity("")
    """The directory to write: pairs.jsonl with the new columns, label.json; must not exist, or be empty."""
    by: Literal["implicit-reward", "follow-up", "contrast", "density-ratio", "file"] = "implicit-reward"
    """implicit-reward: beta times the log-ratio of --model to --reference; follow-up: how likely --model finds the good
    --phrases after a response, and the bad ones; contrast: a reward of each token, from --model prompted for a better
    and for a worse answer (for --loss t_reg); density-ratio: a weight of each row of one response, by a classifier of
    --model's states of the prompts (for --loss "weighted(bco)"); file: columns of --labels."""
    reference: str | None = None
    """Model that implicit rewards are relative to."""
    previous: str | None = None
    """An earlier policy: the share of pairs that both policies rank alike is the label's probability (CREAM)."""
    beta: float = 0.1
    """Of the implicit rewards, and of the probabilities made of rewards."""
    phrases: str | None = None
    """File of follow-ups, one a line: + before a good one, - before a bad one; as many of each."""
    better: str | None = None
    """For contrast: the prompt that requests a better answer, with {prompt} where the prompt goes, and {response} where
    the answer to improve goes, if at all; default: for a helpful, correct, coherent and concise answer."""
    worse: str | None = None
    """And a worse one; default: the opposite."""
    labels: str | None = None
    """File (JSONL, Parquet, CSV ...) with row_id and label_probability, or chosen_reward and rejected_reward; or a run
    of `ches train --loss "lcpo(LOSS)"`, whose posteriors of the pairs it watched are the probabilities."""
    representation: Literal["mean", "last"] = "mean"
    """For density-ratio: which of the model's states stand for a prompt: their mean, or the last one."""
    folds: int = 5
    """Parts that the prompts are dealt into: each is judged by a classifier of the others."""
    seed: int = 0
    """Of the dealing."""
    fit_rows: int = 8192
    """Rows that a classifier is fitted on, at most."""
    penalty: float | None = None
    """Strength of the classifier's penalty; default: the one that predicts the labels of unseen prompts best."""
    min_ratio: float = 0.5
    """Lower bound of the weights of bad rows."""
    max_ratio: float = 10.0
    """And the upper one."""
    relabel: bool = False
    """Exchange the responses of pairs whose label is less likely than not, so that every probability is 0.5 or more."""
    dtype: str = "float32"
    """Dtype of the computation: float32, bfloat16, float16 or float64."""
    on_bad_row: OnBadRow = "error"
    """What becomes of flagged rows: error, drop or keep (where possible)."""
    mesh: str | None = not_identity(None)
    """Devices for the models, such as fsdp=8 or data=2,tensor=2; default: all of them on the data axis."""
    distributed: str = not_identity("off")
    """Several processes: auto (as the cluster says) or coordinator:port,n,id. They run the models together; the first
    one reads and writes everything else."""


NEEDS = {
    "reference": "implicit-reward",
    "previous": "implicit-reward",
    "phrases": "follow-up",
    "better": "contrast",
    "worse": "contrast",
    "labels": "file",
    "representation": "density-ratio",
    "folds": "density-ratio",
    "seed": "density-ratio",
    "fit_rows": "density-ratio",
    "penalty": "density-ratio",
    "min_ratio": "density-ratio",
    "max_ratio": "density-ratio",
}
"""Option -> the way of labelling it belongs to."""


def require_options(config: LabelConfig) -> None:
    """Refuse options that do not go together.

    Raises:
      ChesError: the first.
    """
    if not config.out:
        raise ChesError("--out must be given: the directory to write")
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    for option, by in NEEDS.items():
        if getattr(config, option) != defaults[option] and config.by != by:
            raise ChesError(f"--{option.replace('_', '-')} is for --by {by}, and this is --by {config.by}")
    required = {"implicit-reward": "reference", "follow-up": "phrases", "file": "labels"}.get(config.by)
    if required is not None and getattr(config, required) is None:
        raise ChesError(f"--by {config.by} needs --{required}")
    for option in ("better", "worse"):
        if (frame := getattr(config, option)) is not None and "{prompt}" not in frame:
            raise ChesError(f"--{option} {frame[:40]!r}: expected {{prompt}} in it, where the prompt stands")
    if config.better is not None and config.better == config.worse:
        raise ChesError("--better and --worse ask for the same answer: every reward would be 0")
    given = {"contrast": "rewards of tokens", "density-ratio": "weights"}.get(config.by)
    if given is not None and config.relabel:
        raise ChesError(f"--by {config.by} gives {given} and no probability, so that --relabel has nothing to go by")
    alone = {"file": "runs no model", "density-ratio": "takes one pass over short prompts, on one device"}.get(
        config.by
    )
    if alone is not None and (config.mesh is not None or config.distributed != "off"):
        raise ChesError(f"--by {config.by} {alone}: leave --mesh and --distributed out")
    if config.by == "density-ratio":
        _require_density(config)
    require_dtype("dtype", config.dtype)
    require_positive({"beta": config.beta, "limit": config.limit})


def _require_density(config: LabelConfig) -> None:
    """Refuse numbers that no classifier and no bounds can have, and options of preference pairs."""
    if config.folds < 2:
        raise ChesError(f"--folds {config.folds}: expected 2 or more, so that each prompt is judged by others")
    if config.fit_rows < 2:
        raise ChesError(f"--fit-rows {config.fit_rows}: expected 2 or more")
    if config.seed < 0:
        raise ChesError(f"--seed {config.seed}: expected 0 or more")
    require_positive({"penalty": config.penalty, "min-ratio": config.min_ratio})
    if not config.min_ratio <= config.max_ratio < float("inf"):
        raise ChesError(f"--max-ratio {config.max_ratio}: expected a number, --min-ratio {config.min_ratio} or more")
    if config.candidates is not None or config.schema != "auto":
        raise ChesError(
            "--by density-ratio reads rows of one response (prompt, completion, label; or other names by --columns); "
            "--candidates and --schema are about pairs"
        )


@dataclass(frozen=True, kw_only=True)
class GatherConfig(PairOptions):
    """Which rows to make of pairs and of texts that a model generated.

    >>> GatherConfig(make="samples", responses="runs/generate-001", out="rows").reward_column
    'reward'
    """

    out: str = not_identity("")
    """The directory to write: pairs.jsonl and gather.json; must not exist, or be empty."""
    make: Literal["pairs", "samples", "contests", "against", "filtered", "goals"] = "samples"
    """pairs: the pairs as they are, in one file; samples: prompt, rejected, and the texts as responses (D2O); contests:
    pairs of each prompt's first two different texts, to be labelled (iterative DPO); against: each chosen response with
    each text of its prompt, to be labelled; filtered: the pairs whose chosen response has a reward no lower than the
    text's (fDPO); goals: two rows of each pair, one for the reward of each response, which is then the chosen one
    (reward-augmented data)."""
    responses: str | None = None
    """Directory of `ches generate` whose --prompts were these pairs (or its responses.jsonl)."""
    rewards: str | None = None
    """For filtered: what `ches label` made of `--make against`; or a file with row_id, sample and a reward of each text
    in the unit of the pairs' chosen_reward."""
    reward_column: str = "reward"
    """Its column with the reward: a number, or true and false."""
    goal: str = "(score: {reward:g}) "
    """For goals: what is put before the prompt."""
