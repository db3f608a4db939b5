"""The options of ``ches score``. Plain data: importing this module loads no jax."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from ches_jax.errors import ChesError, did_you_mean
from ches_jax.options import ModelOptions, PairOptions, not_identity, require_dtype, require_positive
from ches_jax.runs.directory import new_name
from ches_jax.types import OnBadRow

ROW_TOKENS = 2048
"""Standard length of a packed row: long enough that little is left over, short enough for one row to fit anywhere."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(PairOptions, ModelOptions):
    """What to score, with what, and how. Every field but ``out`` decides numbers or what becomes of a row.

    >>> ScoreConfig(pairs="pairs.jsonl", by="head_score").eos
    'include'
    """

    adapter: str | None = None
    """PEFT adapter (directory or hub name) to score the model with."""
    out: str | None = not_identity(None)
    """Run directory; default: the first free runs/score-NNN."""
    by: Literal["ches", "head_score"] = "ches"
    """head_score: the exact alpha-weighted score beside CHES (walks the vocabulary: a few times the work)."""
    token_scores: bool = False
    """What each token adds to its pair's scores, in token_scores.parquet; with --by head_score the token scores of NTHR
    (negative token hidden reward) too. Tokens that both responses begin with are there once, as the chosen one's."""
    logps: bool = False
    """Log-probabilities of both responses too."""
    gradients: str | None = None
    """Entanglement of both responses' gradients (norms, inner product, cosine, band of incentives), by an estimator:
    head, lora,rank=8,seed=0, projected,directions=64,seed=0 or full. Two backward passes a pair, but for projected."""
    dtype: str = "float32"
    """Dtype of the computation: float32, bfloat16, float16 or float64. Sums are float32 at least."""
    param_dtype: str | None = None
    """Dtype the weights are kept in; default: as stored."""
    on_bad_row: OnBadRow = "error"
    """What becomes of flagged rows: error, drop (listed in dropped.jsonl) or keep (scored where possible)."""
    batch_tokens: int | Literal["auto"] | None = None
    """Tokens per device and step; default: 2048 on a CPU, 16384 on an accelerator; auto: what the memory holds."""
    chunk_rows: int = 1024
    """Rows per part file: what a killed run loses at most."""
    mesh: str | None = not_identity(None)
    """Devices, such as data=4, fsdp=8 or data=2,tensor=2; default: all local devices on the data axis."""
    attention: str = not_identity("auto")
    """How attention is computed: pallas-tpu, pallas-gpu, blocks or dense; auto: the best that runs here and agrees with
    dense, which is checked."""
    distributed: str = not_identity("off")
    """Several processes: auto (as the cluster says) or coordinator:port,n,id. Each takes chunks; then ches merge."""


class GradientEstimator(NamedTuple):
    """What approximates the gradient of a log-probability (``scores.gradients``)."""

    name: str
    size: int = 0
    """Rank of adapters, number of directions; 0 where there is none."""
    seed: int = 0

    def __str__(self) -> str:
        word = SIZES.get(self.name)
        return f"{self.name},{word[0]}={self.size},seed={self.seed}" if word else self.name


SIZES = {"lora": ("rank", 8), "projected": ("directions", 64)}
"""Estimators with a size: its word, and what it is by default."""
ESTIMATORS = ("head", "lora", "projected", "full")


def parse_gradients(text: str) -> GradientEstimator:
    """The estimator that ``--gradients`` names.

    >>> str(parse_gradients("lora,rank=4"))
    'lora,rank=4,seed=0'

    Raises:
      ChesError: no such estimator, or a number that it does not have.
    """
    name, *numbers = text.split(",")
    if name not in ESTIMATORS:
        raise ChesError(
            f"--gradients {text!r}: expected one of {', '.join(ESTIMATORS)}{did_you_mean(name, ESTIMATORS)}"
        )
    word, default = SIZES.get(name, ("", 0))
    found = {word: default, "seed": 0} if word else {}
    for number in numbers:
        key, _, value = number.partition("=")
        if key not in found or not value.isdecimal() or (key == word and not 0 < int(value) < 2**16):
            there = f"{word} (default {default}) and seed, such as {name},{word}={default}" if word else "no numbers"
            raise ChesError(f"--gradients {text!r}: {number!r} is none of its numbers; {name} has {there}")
        found[key] = int(value)
    return GradientEstimator(name, found.get(word, 0), found.get("seed", 0))


def with_defaults(config: ScoreConfig) -> ScoreConfig:
    """The config with its open options filled in.

    Raises:
      ChesError: an option that no run can have.
    """
    import jax

    require_dtype("dtype", config.dtype)
    require_dtype("param-dtype", config.param_dtype)
    gradients = None if config.gradients is None else str(parse_gradients(config.gradients))
    tokens = config.batch_tokens
    if tokens is None:
        tokens = ROW_TOKENS if jax.default_backend() == "cpu" else 8 * ROW_TOKENS
    counted = None if tokens == "auto" else tokens
    require_positive({"batch-tokens": counted, "chunk-rows": config.chunk_rows, "limit": config.limit})
    return replace(
        config, batch_tokens=tokens, gradients=gradients, out=config.out or str(new_name(Path("runs"), "score"))
    )
