"""``ches label``: pairs to the same pairs with rewards of both responses and how likely each label is right."""

import itertools
import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.data.sources import Record
from ches_jax.data.unpaired import as_one_response
from ches_jax.displacement.changes import FILE_NAME as LOG
from ches_jax.displacement.models import Models
from ches_jax.displacement.ranking import flip_budget, ranking_summary
from ches_jax.displacement.readers.training_run import is_run, read_log_of_run
from ches_jax.errors import ChesError, DataError, require_config
from ches_jax.inputs import Opener
from ches_jax.label.config import LabelConfig, require_options
from ches_jax.label.contrast import BETTER, COLUMNS, WORSE, token_rewards
from ches_jax.label.rewards import consistency, implicit_reward, label_probability
from ches_jax.label.weights import density_weights, rows_of_one_response
from ches_jax.options import PairOptions
from ches_jax.runs.chunks import write_lines
from ches_jax.runs.files import new_directory
from ches_jax.runs.json_text import json_bytes, json_value
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.table import read_table

PAIRS = "pairs.jsonl"
SUMMARY = "label.json"
PROBABILITY, POSTERIOR = "label_probability", "label_posterior"
SCORED = (
    "pairs",
    "split",
    "columns",
    "candidates",
    "schema",
    "limit",
    "eos",
    "template",
    "template_args",
    "max_length",
)
SCORED_HOW = ("dtype", "on_bad_row")

Logps = dict[str, tuple[float, float]]
"""Log-probabilities of chosen and rejected response by the row's id, nats."""


def label(config: LabelConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Write ``config.out``; returns what ``label.json`` holds.

    Args:
      config: whose labels, and where they go.
      quiet: no progress bar.

    Raises:
      ChesError: options or input that are not fit.
      Followed: with ``distributed``, in all processes but the first (``distributed.lead``).

    >>> import json, pathlib, tempfile
    >>> from ches_jax.data.sources import pairs_of_run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ((record,),) = pairs_of_run({"pairs": "bundled", "limit": 1})
    ...     file = pathlib.Path(folder, "labels.jsonl")
    ...     _ = file.write_text(json.dumps({"row_id": record.row_id, "label_probability": 0.75}))
    ...     label(LabelConfig(by="file", labels=str(file), limit=1, out=f"{folder}/out"))["mean_probability"]
    0.75
    """
    require_config("label", config, LabelConfig)
    require_options(config)
    if config.distributed == "off":
        return _label(config, Models.here(config.mesh, quiet))
    from ches_jax.displacement.together import led

    def decided(models: Models) -> tuple[dict[str, Any], tuple[str, int]]:
        record = _label(config, models)
        return record, (f"process 0 has the labels: {headline(record)}", 0)

    return led("label", config, quiet, decided)


def _label(config: LabelConfig, models: Models) -> dict[str, Any]:
    """The labels, in ``config.out``; what ``label.json`` holds."""
    opener = Opener()
    singles = config.by == "density-ratio"
    rows = rows_of_one_response(config, opener) if singles else rows_of(config, opener)
    with tempfile.TemporaryDirectory() as work:
        columns, summary = BY[config.by](config, opener, rows, Path(work), models)
    opener.require_unchanged()  # the pairs are read more than once
    with new_directory(Path(config.out), ChesError) as folder:
        flipped = _write(folder / PAIRS, rows, columns, relabel=config.relabel, singles=singles)
        known = [c[PROBABILITY] for c in columns.values() if PROBABILITY in c]
        record = json_value(
            {
                "verb": "label",
                "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
                "counts": {"rows": len(rows), "labelled": len(columns), "unsure": sum(p < 0.5 for p in known)},
                "relabelled": flipped,
                "mean_probability": float(np.mean(known)) if known else None,
                **opener.identity(),
                **summary,
            }
        )
        (folder / SUMMARY).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def rows_of(config: PairOptions, opener: Opener) -> list[Record]:
    """The pairs that can be read."""
    source = opener.pairs(config.pairs, config.split, config.columns, config.candidates, schema=config.schema)
    groups = itertools.islice(source.rows_from(0), config.limit)
    return [record for group in groups for record in group if not record.fault]


def _write(
    path: Path, rows: Iterable[Record], columns: Mapping[str, Mapping[str, float]], *, relabel: bool, singles: bool
) -> int:
    """The labelled rows (``singles``: of one response each), in order; how many were exchanged."""
    flipped = 0
    with open(path, "wb") as file:
        for row in rows:
            if row.row_id not in columns:
                continue
            new = dict(columns[row.row_id])
            content = {**row.extra, **(as_one_response(row.content) if singles else row.content)}
            if relabel and new[PROBABILITY] < 0.5:
                content, new, flipped = _exchanged(content), _exchanged(new), flipped + 1
                new[PROBABILITY] = 1 - new[PROBABILITY]
            category = {} if row.category is None else {"category": row.category}
            file.write(json_bytes({**content, **category, **new, "row_id": row.row_id}))
    return flipped


def _exchanged(values: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of the two responses, the other way round."""
    other = {n: n.replace("chosen", "rejected") if "chosen" in n else n.replace("rejected", "chosen") for n in values}
    return {n: values.get(other[n], value) for n, value in values.items()}


Columns = dict[str, dict[str, Any]]
"""New columns by the row's id."""


def _by_implicit_reward(
    config: LabelConfig, opener: Opener, rows: Sequence[Record], work: Path, models: Models
) -> tuple[Columns, dict[str, Any]]:
    """Rewards of --model relative to --reference, and what both rank rightly."""
    named = {"policy": config.model, "reference": config.reference, "previous": config.previous}
    found = {name: _logps(config, str(m), work / name, models) for name, m in named.items() if m is not None}
    ids = [row_id for row_id in found["policy"] if all(row_id in logps for logps in found.values())]
    sides = {name: np.array([logps[i] for i in ids], float).reshape(-1, 2).T for name, logps in found.items()}
    rewards = implicit_reward(sides["policy"], sides["reference"], config.beta)
    probability = label_probability(*rewards)
    summary = ranking_summary(tuple(sides["policy"]), tuple(sides["reference"]), config.beta)  # type: ignore[arg-type]
    if "previous" in sides:
        before = implicit_reward(sides["previous"], sides["reference"], config.beta)
        share = consistency(rewards[0] - rewards[1], before[0] - before[1])
        summary["consistency"] = share
        # CREAM: every pair as its own policy ranks it, and all as sure as the two policies agree
        probability = np.where(probability >= 0.5, share, 1 - share)
    budget = flip_budget(sides["reference"][0] - sides["reference"][1], config.beta)
    columns = {
        row_id: {
            "chosen_reward": float(c),
            "rejected_reward": float(r),
            PROBABILITY: float(p),
            "flip_budget": float(b),
        }
        for row_id, c, r, p, b in zip(ids, *rewards, probability, budget, strict=True)
    }
    return columns, {"ranking": summary}


def _logps(config: LabelConfig, model: str, out: Path, models: Models) -> Logps:
    """Log-probabilities that a model gives the pairs."""
    options = {name: getattr(config, name) for name in (*SCORED, *SCORED_HOW)}
    return _of_table(models.score(ScoreConfig(model=model, logps=True, out=str(out), **options)))


def _of_table(directory: Path) -> Logps:
    table, _ = read_table(directory)
    columns = (table[name].to_pylist() for name in ("row_id", "logp_chosen", "logp_rejected"))
    return {i: (c, r) for i, c, r in zip(*columns, strict=True) if c is not None and r is not None}


def _by_follow_up(
    config: LabelConfig, opener: Opener, rows: Sequence[Record], work: Path, models: Models
) -> tuple[Columns, dict[str, Any]]:
    r"""Follow-up likelihood as reward: how likely the model finds good follow-ups after a response, and bad ones.

    .. math:: s(y) = \operatorname{mean}_i \ln \pi(f^+_i | x, y) - \ln \pi(f^-_i | x, y)

    References:
      Zhang et al., Aligning Language Models Using Follow-up Likelihood as Reward Signal
      (https://arxiv.org/abs/2409.13948).
    """
    good, bad = read_phrases(opener.file(Path(str(config.phrases)), "phrases"))
    asked = []
    for number, row in enumerate(rows):
        if not all(isinstance(row.content.get(name), str) for name in ("prompt", "chosen", "rejected")):
            raise DataError(
                f"{config.pairs}, {row.where}: --by follow-up puts a phrase behind each response, and reads prompts "
                "and responses that are texts; these are conversations or token ids"
            )
        for side in ("chosen", "rejected"):
            text = row.content["prompt"] + row.content[side] + "\n"
            for one, other in zip(good, bad, strict=True):
                asked.append({"prompt": text, "chosen": one, "rejected": other, "row": number, "side": side})
    file = work / "follow_ups.jsonl"
    write_lines(file, asked)
    models.share(file)
    how = {name: getattr(config, name) for name in ("template", "template_args", "max_length", *SCORED_HOW)}
    out = models.score(
        ScoreConfig(model=config.model, pairs=str(file), logps=True, eos="exclude", out=str(work / "asked"), **how)
    )
    table, _ = read_table(out)
    sums = np.zeros((len(rows), 2))
    counts = np.zeros((len(rows), 2))
    for index, c, r in zip(*(table[n].to_pylist() for n in ("index", "logp_chosen", "logp_rejected")), strict=True):
        at = asked[index]["row"], int(asked[index]["side"] == "rejected")
        sums[at] += (c - r) / len(good)
        counts[at] += 1
    whole = np.flatnonzero((counts == len(good)).all(1))
    probability = label_probability(*(config.beta * sums[whole]).T)
    columns = {
        rows[i].row_id: {
            "chosen_reward": float(sums[i, 0]),
            "rejected_reward": float(sums[i, 1]),
            PROBABILITY: float(p),
        }
        for i, p in zip(whole.tolist(), probability, strict=True)
    }
    return columns, {"phrases": {"good": good, "bad": bad}}


def read_phrases(path: Path) -> tuple[list[str], list[str]]:
    """Good and bad follow-ups of a file.

    Raises:
      ChesError: it cannot be read, a line has no sign, or there are not as many good ones as bad ones.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ChesError(f"--phrases {path}: {getattr(error, 'strerror', None) or 'is no text in UTF-8'}") from None
    for number, line in enumerate(lines, 1):
        if line[0] not in "+-" or not line[1:].strip():
            raise ChesError(f"--phrases {path}, line {number}: expected + or - and a phrase; found {line[:40]!r}")
    good, bad = ([line[1:].strip() for line in lines if line[0] == sign] for sign in "+-")
    if not good or len(good) != len(bad):
        raise ChesError(f"--phrases {path}: {len(good)} good and {len(bad)} bad follow-ups; give as many of each")
    return good, bad


def _by_contrast(
    config: LabelConfig, opener: Opener, rows: Sequence[Record], work: Path, models: Models
) -> tuple[Columns, dict[str, Any]]:
    """A reward of each token of both responses."""
    columns: Any = token_rewards(config, opener, rows, work, models)
    means = {name: float(np.mean([np.mean(c[name]) for c in columns.values()])) for name in COLUMNS if columns}
    return columns, {"asked": {"better": config.better or BETTER, "worse": config.worse or WORSE}, "mean_reward": means}


def _by_density_ratio(
    config: LabelConfig, opener: Opener, rows: Sequence[Record], work: Path, models: Models
) -> tuple[Columns, dict[str, Any]]:
    """A weight of each row of one response."""
    return density_weights(config, opener, rows)


def _by_file(
    config: LabelConfig, opener: Opener, rows: Sequence[Record], work: Path, models: Models
) -> tuple[Columns, dict[str, Any]]:
    """Columns of --labels, joined by ``row_id``."""
    known = {row.row_id for row in rows}
    columns: Columns = {}
    place = Path(str(config.labels))
    if is_run(place):
        return _posteriors(place, opener, known), {"labels": str(place)}
    for where, values in opener.labels(str(config.labels)):
        row_id, subject = values.get("row_id"), f"--labels {config.labels}, {where}"
        if not isinstance(row_id, str) or row_id not in known:
            raise DataError(f"{subject}: row_id {row_id!r} is none of the pairs'")
        rewards = [values.get(name) for name in ("chosen_reward", "rejected_reward")]
        probability: Any = values.get(PROBABILITY)
        if probability is None and all(_is_number(r) for r in rewards):
            probability = float(label_probability(*(config.beta * np.array(r, float) for r in rewards)))
        if probability is None or not _is_number(probability) or not 0 <= probability <= 1:
            raise DataError(
                f"{subject}: expected {PROBABILITY} from 0 to 1, or numbers in chosen_reward and rejected_reward"
            )
        if row_id in columns:
            raise DataError(f"{subject}: a second label of row_id {row_id}")
        found: dict[str, Any] = dict(zip(("chosen_reward", "rejected_reward"), rewards, strict=True))
        found = {name: reward for name, reward in found.items() if _is_number(reward)}
        columns[row_id] = {**found, PROBABILITY: float(probability)}
    return columns, {"labels": str(config.labels)}


def _posteriors(run: Path, opener: Opener, known: Collection[str]) -> Columns:
    """LCPO's posteriors of the pairs that a training run watched, as its last evaluation has them.

    Raises:
      ChesError: the run is not finished, has none, or has none of these pairs.
    """
    opener.file(run / LOG, "labels")
    table = read_log_of_run(run)
    if POSTERIOR not in table.column_names or table[POSTERIOR].null_count == len(table):
        raise DataError(f"--labels {run}: a run without posteriors of labels; train with --loss 'lcpo(LOSS)'")
    rows = zip(*(table[name].to_pylist() for name in ("step", "row_id", POSTERIOR)), strict=True)
    last = {row_id: p for _, row_id, p in sorted(rows, key=lambda row: row[0]) if p is not None}
    columns: Columns = {row_id: {PROBABILITY: p} for row_id, p in last.items() if row_id in known}
    if not columns:
        raise DataError(f"--labels {run}: its posteriors are of other pairs than those of --pairs")
    return columns


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


BY = {
    "implicit-reward": _by_implicit_reward,
    "follow-up": _by_follow_up,
    "contrast": _by_contrast,
    "density-ratio": _by_density_ratio,
    "file": _by_file,
}


def headline(record: Mapping[str, Any]) -> str:
    """One line of results."""
    n = record["counts"]
    if "density" in record:
        return f"{n['labelled']} of {n['rows']} rows have a weight"
    return f"{n['labelled']} of {n['rows']} pairs labelled, {n['unsure']} unsure"


def summary_text(record: Mapping[str, Any]) -> str:
    """The summary for a person."""
    n = record["counts"]
    if "density" in record:
        return _density_text(record["density"])
    lines = [f"{n['labelled']} of {n['rows']} pairs have a probability; {n['unsure']} labels are less likely than not"]
    if "mean_reward" in record:
        lines = [f"{n['labelled']} of {n['rows']} pairs have rewards of their tokens"]
        lines += [f"{name}: mean {mean:+.3f}" for name, mean in record["mean_reward"].items()]
    if record.get("relabelled"):
        lines.append(f"{record['relabelled']} pairs were exchanged")
    words = {
        "ranking_accuracy_reference": "pairs that the reference ranks rightly",
        "ranking_accuracy_policy": "pairs that the policy ranks rightly",
        "flipped_to_right": "pairs that became right",
        "flipped_to_wrong": "pairs that became wrong",
        "implicit_reward_accuracy": "pairs whose implicit rewards agree with the label",
        "calibration_error": "calibration error of the implicit rewards",
        "consistency": "pairs that policy and earlier policy rank alike",
    }
    lines += [f"{words[k]}: {v:.1%}" for k, v in record.get("ranking", {}).items()]
    return "\n".join(lines)


def _density_text(found: Mapping[str, Any]) -> str:
    """What the classifier of prompts knows, and what became of the weights."""
    rows = f"{found['good']} good and {found['bad']} bad rows of {found['prompts']} prompts"
    if found["penalty"] is None:
        return f"{rows}: no classifier tells their prompts apart, so that every ratio is 1"
    low, high = found["bounds"]
    return "\n".join(
        [
            f"{rows}; of unseen prompts the classifier ranks {found['held_out_auc']:.1%} of pairs of rows rightly "
            f"(loss {found['held_out_loss']:.3f} nats, a coin's {np.log(2):.3f}; penalty {found['penalty']:g})",
            f"bad rows: {found['at_lower_bound']:.1%} at the lower bound {low:g}, {found['at_upper_bound']:.1%} at the "
            f"upper one {high:g}; they count like {found['effective_bad']:.1f} rows of one weight",
        ]
    )
