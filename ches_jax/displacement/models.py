"""The changes between two models: both score the same pairs, as the same tokens."""

import dataclasses
from collections.abc import Callable
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ches_jax.displacement.changes import Changes
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.errors import ChesError, RunError
from ches_jax.runs.store import is_address, is_there, place

if TYPE_CHECKING:
    from ches_jax.generate.config import GenerateConfig
    from ches_jax.inputs import Inputs
    from ches_jax.scores.config import ScoreConfig

ADAPTER = "adapter_config.json"
OPTIONS = ("pairs", "split", "columns", "candidates", "limit", "eos", "template", "max_length", "dtype", "on_bad_row")
"""Of a diagnosis, which decide how models score."""


class Models(NamedTuple):
    """How models are run: functions from a config to a run directory, and a way to show them a file that was made."""

    score: "Callable[[ScoreConfig], Path]"
    generate: "Callable[[GenerateConfig], Path]"
    share: Callable[[Path], None]

    @classmethod
    def here(cls, mesh: str | None, quiet: bool) -> "Models":
        """In this process alone. Runs that a diagnosis left in its --out, finished or not, are taken up again."""

        def score(config: "ScoreConfig") -> Path:
            from ches_jax.scores.run import score

            return score(dataclasses.replace(config, mesh=mesh), quiet=quiet, resume=True)

        def generate(config: "GenerateConfig") -> Path:
            from ches_jax.generate.run import generate

            return generate(dataclasses.replace(config, mesh=mesh), quiet=quiet, resume=True)

        return cls(score, generate, share=lambda path: None)


def changes_between_models(config: DiagnoseConfig, work: Path, models: Models) -> Changes:
    """Scores --pairs with both models, in two runs below ``work``, and compares.

    Args:
      config: ``before`` and ``after`` are model directories or hub names; ``after`` may be an adapter for ``before``.
      work: directory for the two score runs.
      models: how they are run.

    Raises:
      ChesError: what scoring refuses; a pair whose tokens are not the same for both models.
    """
    from ches_jax.displacement.readers.logp_tables import read_score_tables
    from ches_jax.inputs import Opener, open_model_and_pairs
    from ches_jax.scores.config import ScoreConfig

    assert config.before is not None and config.after is not None
    if config.pairs is None:
        raise ChesError("--before MODEL --after MODEL needs --pairs FILE: the pairs that both models score")
    options = {name: getattr(config, name) for name in OPTIONS}
    first = ScoreConfig(model=config.before, logps=True, out=str(work / "before"), **options)
    second = dataclasses.replace(first, **_second(config), out=str(work / "after"))
    _require_same_tokens(*(open_model_and_pairs(run, Opener()) for run in (first, second)))
    tables = [models.score(run) for run in (first, second)]
    return _with_dropped(read_score_tables(tables[0], tables[1], same_tokens=True), tables[1])


def _with_dropped(changes: Changes, scored: Path) -> Changes:
    """The changes, with a note of the rows that scoring left out."""
    from ches_jax.runs.directory import RUN, read_json

    counts = read_json(scored / RUN).get("counts") or {}
    if not (dropped := counts.get("dropped")):
        return changes
    where = f"{scored.name}/dropped.jsonl of --out says why"
    note = f"{dropped:,} of {counts.get('rows', 0):,} rows are not fit to be scored and were left out: {where}"
    return dataclasses.replace(changes, caveats=(*changes.caveats, note))


def _second(config: DiagnoseConfig) -> dict[str, Any]:
    """The options that name the second model: an adapter is one of the first."""
    assert config.after is not None
    after = place(config.after) if is_address(config.after) else Path(config.after)
    return {"model": config.before, "adapter": config.after} if is_there(after / ADAPTER) else {"model": config.after}


def _require_same_tokens(first: "Inputs", second: "Inputs") -> None:
    """Refuses models whose tokenizers read a pair differently."""
    one, other = (chain.from_iterable(pairs for _, pairs in inputs.chunks()) for inputs in (first, second))
    for a, b in zip_longest(one, other):
        sides = ("prompts", "chosen", "rejected")
        differ = [s for s in sides if a is None or b is None or getattr(a, s) != getattr(b, s)]
        if differ:
            row = a.index if a is not None else b.index if b is not None else 0
            raise RunError(
                f"row {row}: the two models read its {' and '.join(differ)} as other tokens (tokenizer, template or "
                "context differ), so their log-probabilities are of different events; give both the tokenizer of the "
                "first, and --max-length of the shorter context"
            )


def generated_and_judged(config: DiagnoseConfig, work: Path, models: Models) -> tuple[tuple[str, str], tuple[str, str]]:
    """Both models answer --generate, and rules judge whether they refused; directories of responses and judgments.

    Raises:
      ChesError: --before and --after are no models; what generating refuses.
    """
    from ches_jax.generate.config import GenerateConfig
    from ches_jax.judges.config import JudgeConfig
    from ches_jax.judges.run import judge

    if config.before is None or config.after is None:
        raise ChesError("--generate needs --before MODEL and --after MODEL")
    named: dict[str, dict[str, Any]] = {"before": {"model": config.before}, "after": _second(config)}
    out = []
    for name, model in named.items():
        responses = models.generate(
            GenerateConfig(
                **model,
                prompts=str(config.generate),
                template=config.template,
                dtype=config.dtype,
                samples=2,
                out=str(work / f"responses-{name}"),
            )
        )
        judged = judge(
            JudgeConfig(responses=str(responses), out=str(work / f"judgments-{name}")), quiet=True, resume=True
        )
        out.append((str(responses), str(judged)))
    (first, one), (second, other) = out
    return (first, second), (one, other)
