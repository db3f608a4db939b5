"""The options of ``ches score``. Plain data: importing this module loads no jax."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

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
    (negative token hidden reward) too."""
    logps: bool = False
    """Log-probabilities of both responses too."""
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


def with_defaults(config: ScoreConfig) -> ScoreConfig:
    """The config with its open options filled in.

    Raises:
      ChesError: an option that no run can have.
    """
    import jax

    require_dtype("dtype", config.dtype)
    require_dtype("param-dtype", config.param_dtype)
    tokens = config.batch_tokens
    if tokens is None:
        tokens = ROW_TOKENS if jax.default_backend() == "cpu" else 8 * ROW_TOKENS
    counted = None if tokens == "auto" else tokens
    require_positive({"batch-tokens": counted, "chunk-rows": config.chunk_rows, "limit": config.limit})
    return replace(config, batch_tokens=tokens, out=config.out or str(new_name(Path("runs"), "score")))
