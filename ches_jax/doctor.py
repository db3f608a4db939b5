"""``ches doctor``: is this model directory whole, and are these pairs fit to be scored with it? No forward pass.

Pairs without a model are examined as data (``ches_jax.health``): what can be wrong with them whatever the model.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ches_jax.bundled import BUNDLED
from ches_jax.errors import ChesError, require_config
from ches_jax.face import make_callable
from ches_jax.options import ModelOptions, PairOptions

if TYPE_CHECKING:
    from ches_jax.data.audit import Audit
    from ches_jax.data.sources import PairSource
    from ches_jax.data.template import ChatTemplate
    from ches_jax.health.examine import Health

make_callable(__name__)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(PairOptions, ModelOptions):
    """What to look at, under the options it would be scored with.

    >>> DoctorConfig(pairs="pairs.jsonl").show
    2
    """

    model: str | None = None  # type: ignore[assignment]
    """Model directory or hub name. Without one, --pairs (or rows of prompt, completion, label) are examined as
    data: lengths, refusals, duplicates, contradictions, scores, languages. Without both: the bundled ones."""
    show: int = 2
    """Rows to print as the model sees them, flagged rows first; without a model, examples of each check."""
    against: str | None = None
    """Other data (a test set): prompts that stand there too are leaks. For --pairs without a model."""


@dataclass(frozen=True)
class Findings:
    """The result of an examination."""

    model: dict[str, Any]
    audit: "Audit"
    rows: list[str]

    @property
    def healthy(self) -> bool:
        """Whether no row is flagged."""
        return not self.audit.flagged

    @property
    def headline(self) -> str:
        """One line."""
        return f"{self.audit.rows} rows, {self.audit.flagged} flagged"

    @property
    def counts(self) -> dict[str, int]:
        """For the record of ``--json``."""
        return {"rows": self.audit.rows, "flagged": self.audit.flagged}

    def text(self) -> str:
        """For a person."""
        model = "\n".join(f"{name:<16}{value}" for name, value in self.model.items())
        return "\n\n".join([model, self.audit.describe(), *self.rows])

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return {"model": self.model, "pairs": self.audit.to_json(), "healthy": self.healthy}


def doctor(config: DoctorConfig) -> "Findings | Health":
    """Check the directory's names and shapes and audit every pair; without a model, examine the pairs as data.

    Args:
      config: what to look at.

    Raises:
      ChesError: the directory or the pairs cannot be read at all.

    >>> doctor(DoctorConfig(limit=4)).healthy
    True
    """
    require_config("doctor", config, DoctorConfig)
    if config.model is None and config.pairs != BUNDLED:
        return _without_a_model(config)
    if config.against is not None:
        raise ChesError("--against compares texts, without a model: leave out --model, and name the data with --pairs")
    from ches_jax.data.audit import Audit, visible
    from ches_jax.inputs import Opener, open_model_and_pairs
    from ches_jax.models.checkpoint.load import open_checkpoint
    from ches_jax.models.decoder import parameter_count
    from ches_jax.scores.config import ScoreConfig

    options = {k: getattr(config, k) for k in DoctorConfig.__dataclass_fields__ if k not in ("show", "against")}
    options["model"] = config.model or BUNDLED
    opener = Opener()
    inputs = open_model_and_pairs(ScoreConfig(**options), opener)
    checkpoint = open_checkpoint(inputs.model.directory)
    c = checkpoint.config
    dtypes = Counter(t.dtype for t in checkpoint.tensors.values())
    tokenizer = inputs.tokenizer.tokenizer
    model = {
        "model": str(inputs.model.directory),
        "family": c.family,
        "parameters": f"{parameter_count(c):,}",
        "stored as": ", ".join(f"{d} ({n} tensors)" for d, n in dtypes.items()),
        "context": c.max_positions,
        "vocabulary": f"{c.vocab_size} ({len(tokenizer)} in the tokenizer)",
        "fingerprint": opener.identity()["model_fingerprint"],
        **({"stored quantised": q} if (q := opener.identity().get("model_quantisation")) else {}),
        "chat template": _chat_template(inputs.tokenizer.writer.chat),
        "pairs": inputs.source.describe(),
    }
    audit = Audit(tokenizer.bos_token_id, tokenizer.eos_token_id)  # type: ignore[arg-type]
    flagged, clean = [], []
    for _, chunk in inputs.chunks():
        audit.extend(chunk)
        for pair in chunk:
            kept = flagged if pair.flags else clean
            if len(kept) < config.show:
                kept.append(visible(tokenizer, pair))
    return Findings(model, audit, (flagged + clean)[: config.show])


def _without_a_model(config: DoctorConfig) -> "Health":
    from ches_jax.health.examine import examine

    return examine(_rows(config), limit=config.limit, against=config.against, show=config.show)


def _rows(config: DoctorConfig) -> "PairSource":
    """Preference pairs, or single responses with a label."""
    from ches_jax.data.sources import open_pairs, open_rows
    from ches_jax.data.unpaired import COMPLETION, LABEL, LABELLED
    from ches_jax.errors import DataError

    if {*COMPLETION, LABEL} & config.columns.keys():
        return open_rows(config.pairs, config.split, config.columns, LABELLED)
    try:
        return open_pairs(config.pairs, config.split, config.columns, config.candidates, config.schema)
    except DataError as error:
        try:
            return open_rows(config.pairs, config.split, config.columns, LABELLED)
        except DataError:
            raise error from None


def _chat_template(template: "ChatTemplate") -> str:
    from ches_jax.data.habits import describe
    from ches_jax.errors import DataError

    if not template.exists:
        return "none"
    try:
        return describe(template)
    except DataError as error:
        return f"cannot be used: {error}"
