"""The options of ``ches generate``. Plain data: importing this module loads no jax."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ches_jax.bundled import BUNDLED
from ches_jax.errors import ChesError
from ches_jax.options import ModelOptions, RowOptions, not_identity, require_dtype, require_positive
from ches_jax.runs.directory import new_name
from ches_jax.types import OnBadRow

if TYPE_CHECKING:
    from ches_jax.generate.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RowOptions, ModelOptions):
    """What to continue, with what, and how tokens are drawn.

    >>> GenerateConfig(temperature=0.0, max_new_tokens=8).samples
    1
    """

    prompts: str = BUNDLED
    """JSONL, JSON, Parquet, Arrow, CSV or text file, save_to_disk folder or hub name; preference pairs will do too."""
    schema: str = "auto"
    """What the columns mean: auto (recognised and reported), a preset by name, a JSON or TOML file (docs/data.md)."""
    adapter: str | None = None
    """PEFT adapter (directory or hub name) to continue with."""
    out: str | None = not_identity(None)
    """Run directory; default: the first free runs/generate-NNN."""
    samples: int = 1
    """Texts per prompt."""
    max_new_tokens: int = 256
    """Most tokens of a text."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    seed: int = 0
    """Of all samples. A row's text follows from seed, prompt and number of the sample, whatever stands beside it."""
    stop: tuple[str, ...] = ()
    """Strings that end a text; they are not part of it."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a text, beside the end-of-sequence tokens of model and tokenizer: <|im_end|>."""
    dtype: str = "float32"
    """Dtype of the computation: float32, bfloat16, float16 or float64."""
    param_dtype: str | None = None
    """Dtype the weights are kept in; default: that of the computation."""
    on_bad_row: OnBadRow = "error"
    """What becomes of empty or too long prompts and of those with two BOS: error, drop (listed in dropped.jsonl) or
    keep (where possible)."""
    batch_size: int = 32
    """Texts made together. On a CPU up to four such batches are made at a time, one for each core."""
    chunk_rows: int = 256
    """Prompts per part file: what a killed run loses at most."""
    mesh: str | None = not_identity(None)
    """Devices, such as data=4, fsdp=8 or data=2,tensor=2; default: all local devices on the data axis."""
    distributed: str = not_identity("off")
    """Several processes: auto (as the cluster says) or coordinator:port,n,id. Each takes chunks; then ches merge. On a
    mesh over all of them they make every text together."""

    @property
    def sampling(self) -> "Sampling":
        """How tokens are drawn."""
        from ches_jax.generate.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p)


def checked(config: GenerateConfig) -> GenerateConfig:
    """The config with a run directory.

    Raises:
      ChesError: the first option that no run can have.
    """
    require_dtype("dtype", config.dtype)
    require_dtype("param-dtype", config.param_dtype)
    numbers = {
        "samples": config.samples,
        "max-new-tokens": config.max_new_tokens,
        "limit": config.limit,
        "batch-size": config.batch_size,
        "chunk-rows": config.chunk_rows,
    }
    require_positive(numbers)
    if "" in config.stop:
        raise ChesError("--stop '': an empty string would end every text before it begins")
    _ = config.sampling
    return replace(config, out=config.out or str(new_name(Path("runs"), "generate")))
