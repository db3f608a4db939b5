"""The options of ``ches score``, and what the words among them mean."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ches_jax.bundled import BUNDLED
from ches_jax.data.prompts import Pairing, Template
from ches_jax.errors import ChesError
from ches_jax.options import Columns
from ches_jax.runs.directory import new_name
from ches_jax.types import Eos, OnBadRow

ROW_TOKENS = 2048
"""Standard length of a packed row: long enough that little is left over, short enough for one row to fit anywhere."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What to score, with what, and how. Every field but ``out`` decides numbers or what becomes of a row."""

    model: str = BUNDLED
    """Hugging Face model directory or hub name; default: the bundled model."""
    adapter: str | None = None
    """PEFT adapter (directory or hub name) to score the model with."""
    pairs: str = BUNDLED
    """JSONL, JSON, Parquet or Arrow file, save_to_disk folder or hub name; default: the bundled pairs."""
    split: str | None = None
    """Split of a data set folder or hub data set."""
    columns: Columns = field(default_factory=dict)
    """Other names of columns: prompt=instruction. A dot reaches into objects: responses=completions.response."""
    candidates: Pairing | None = None
    """Pairs of rows with several `responses`: chosen-against-all (the default: the one that `chosen` numbers, with the
    highest of `scores`, or else the first) or all-pairs (every better one against every worse one)."""
    limit: int | None = None
    """Score only the first rows."""
    out: str | None = None
    """Run directory; default: the first free runs/score-NNN."""
    by: Literal["ches", "head_score"] = "ches"
    """head_score: the exact alpha-weighted score beside CHES (walks the vocabulary: a few times the work)."""
    token_scores: bool = False
    """What each token adds to its pair's scores, in token_scores.parquet; with --by head_score the token scores of NTHR
    (negative token hidden reward) too."""
    logps: bool = False
    """Log-probabilities of both responses too."""
    eos: Eos = "include"
    """Whether the terminator of a complete response counts in |y|."""
    dtype: str = "float32"
    """Dtype of the computation: float32, bfloat16, float16 or float64. Sums are float32 at least."""
    param_dtype: str | None = None
    """Dtype the weights are kept in; default: as stored."""
    max_length: int | None = None
    """Most tokens of prompt and response together; default: the model's context."""
    template: Template = "auto"
    """Chat template: auto (conversations only), always, or none."""
    on_bad_row: OnBadRow = "error"
    """What becomes of flagged rows: error, drop (listed in dropped.jsonl) or keep (scored where possible)."""
    batch_tokens: int | Literal["auto"] | None = None
    """Tokens per device and step; default: 2048 on a CPU, 16384 on an accelerator; auto: what the memory holds."""
    chunk_rows: int = 1024
    """Rows per part file: what a killed run loses at most."""
    mesh: str | None = None
    """Devices, such as data=4, fsdp=8 or data=2,tensor=2; default: all local devices on the data axis."""
    attention: str = "auto"
    """How attention is computed: pallas-tpu, pallas-gpu, blocks or dense; auto: the best that runs here and agrees with
    dense, which is checked."""
    distributed: str = "off"
    """Several processes: auto (as the cluster says) or coordinator:port,n,id. Each takes chunks; then ches merge."""
    compilation_cache: str | None = None
    """Directory that keeps compiled programs between runs."""


def with_defaults(config: ScoreConfig) -> ScoreConfig:
    """The config with its open options filled in.

    Raises:
      ChesError: an option that no run can have.
    """
    import jax

    for name, dtype in [("dtype", config.dtype), ("param-dtype", config.param_dtype or config.dtype)]:
        if dtype not in DTYPES:
            raise ChesError(f"--{name} {dtype!r}: expected one of {', '.join(DTYPES)}")
    tokens = config.batch_tokens
    if tokens is None:
        tokens = ROW_TOKENS if jax.default_backend() == "cpu" else 8 * ROW_TOKENS
    for name, value in [("batch-tokens", tokens), ("chunk-rows", config.chunk_rows), ("limit", config.limit)]:
        if isinstance(value, int) and value < 1:
            raise ChesError(f"--{name} {value}: expected a positive number")
    return replace(config, batch_tokens=tokens, out=config.out or str(new_name(Path("runs"), "score")))
