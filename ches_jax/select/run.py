"""``ches select``: a score table and a rule (``rules``) to a preference dataset that tells how it was chosen."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.errors import RunError, require_config
from ches_jax.runs.files import new_directory
from ches_jax.runs.json_text import json_bytes, json_value
from ches_jax.runs.store import fetched_run, output_place, place
from ches_jax.scores.formulas import numbers
from ches_jax.scores.table import CANDIDATES, INFLUENCE, Scores, open_table, words
from ches_jax.select.columns import data_columns, read_columns, repeats, selection_values
from ches_jax.select.config import SelectConfig
from ches_jax.select.dataset_card import card
from ches_jax.select.keep import keep_indices, matched_control, parse_rule, soft_weights
from ches_jax.select.scored_rows import SourceRow, dropped_when_scored, joined, key_of, read_run, source_rows
from ches_jax.stats import spearman

SUMMARY = "selection.json"
BUFFER = 1 << 20
"""Bytes that are written at once."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to each row of the table."""

    values: np.ndarray
    """The score, NaN where there is none."""
    kept: np.ndarray
    """True where the row is kept."""
    weights: np.ndarray | None
    soft: dict[str, float] | None
    repeats: Mapping[int, str] = field(default_factory=dict)
    """Positions of the rows that repeat an earlier one, and how."""


def decide(table: Scores, config: SelectConfig, rows: Iterable[SourceRow] = ()) -> Decision:
    """Applies the rule, and the control when there is one.

    Args:
      table: the scores.
      config: what to select.
      rows: the data, read once where ``--by`` names a column of them or ``--dedup`` compares them.

    Raises:
      RunError: unknown score or rule, no row has the score, or the rule keeps none.
    """
    rule = parse_rule(config.keep)
    columns, repeated = data_columns(table, config), {}
    data, texts = read_columns(table, rows, columns, config) if needs_data(table, config) else ({}, [])
    values = selection_values(table, config, data)
    if config.dedup != "none":
        repeated = repeats(texts, values, config.dedup)
        values[list(repeated)] = np.nan
    scored = values[np.isfinite(values)]
    if scored.size == 0:
        raise RunError(f"{config.scores}: none of its {len(table)} rows has the score {config.by!r}")
    chosen = keep_indices(values, rule)
    if chosen.size == 0:
        raise RunError(
            f"--keep {rule.text!r} keeps none of {scored.size} rows: "
            f"{config.by} runs from {scored.min():.6g} to {scored.max():.6g}"
        )
    count = scored.size
    del scored
    places = _places(table, values, config)
    kept = np.zeros(len(table), dtype=bool)
    kept[places[chosen]] = True
    if rule.kind != "soft":
        return Decision(values, kept, None, None, repeated)
    plain, slope = soft_weights(values, float(rule.numbers[0]))
    weights = np.full(len(table), np.nan)
    weights[places[chosen]] = plain[chosen]
    del plain, places, chosen
    soft = {
        "slope": slope,
        "effective_mass": float(np.nansum(weights) / count),
        "fraction_zero": float((weights[kept] == 0).mean()),
        "spearman_weight_length_difference": spearman(weights, _longer(table)),
        "spearman_weight_total_length": spearman(
            weights, numbers(table, "rejected_tokens") + numbers(table, "chosen_tokens")
        ),
    }
    return Decision(values, kept, weights, soft, repeated)


def _longer(table: Scores) -> np.ndarray:
    """Tokens by which the rejected response is the longer one, [rows]."""
    longer = numbers(table, "rejected_tokens")
    longer -= numbers(table, "chosen_tokens")
    return longer


def _places(table: Scores, values: np.ndarray, config: SelectConfig) -> np.ndarray:
    """For each row the one that is kept in its place (``matched_control``)."""
    longer = _longer(table) if config.control == "length" else values
    return matched_control(values, config.control, longer, config.seed)


def needs_data(table: Scores, config: SelectConfig) -> bool:
    """Whether the decision needs more than the score table."""
    return bool(config.dedup != "none" or data_columns(table, config))


def describe(table: Scores, decision: Decision, config: SelectConfig) -> dict[str, Any]:
    """The numbers of a selection: counts, ranges, lengths of kept rows and of all, categories."""
    scored = np.isfinite(decision.values)
    longer = _longer(table)
    lengths: dict[str, dict[str, float]] = {"kept": {}, "all": {}}
    for column in ("chosen_tokens", "rejected_tokens", "rejected_minus_chosen"):
        values = longer if column == "rejected_minus_chosen" else numbers(table, column)
        lengths["kept"][column] = float(values[decision.kept].mean())
        lengths["all"][column] = float(values[scored].mean())
    numbers_told: dict[str, Any] = {
        "counts": {
            "table": len(table),
            "scored": int(scored.sum()),
            "kept": int(decision.kept.sum()),
        },
        "score_range": {
            "kept": _range(decision.values[decision.kept]),
            "all": _range(decision.values),
        },
        "mean_lengths": lengths,
        "spearman_score_length_difference": spearman(decision.values, longer),
        "soft": decision.soft,
    }
    if "category" in table.schema.names:
        names, which = words(table, "category")
        counts = [np.bincount(which[rows], minlength=len(names)).tolist() for rows in (scored, decision.kept)]
        numbers_told["categories"] = {
            name: {"scored": of_scored, "kept": of_kept}
            for name, of_scored, of_kept in zip(names, *counts, strict=True)
        }
    return numbers_told


def _range(values: np.ndarray) -> list[float]:
    return [float(np.nanmin(values)), float(np.nanmax(values))]


def select(config: SelectConfig, rows: Iterable[SourceRow] | None = None) -> dict[str, Any]:
    """Writes the selection to ``config.out``: a preference dataset that tells how it was chosen.

    ``pairs.jsonl`` (the kept rows' content, category, ``row_id`` and score), ``kept_ids.txt``,
    ``dropped.jsonl`` (every other row of the source, with the reason), ``selection.json`` and the
    card ``README.md``.

    Args:
      config: what to select.
      rows: the rows that were scored, in order; opened from the run when not given.

    Returns:
      What ``selection.json`` holds.

    Raises:
      RunError: bad rule, score or directory, or the pairs are not those that were scored.

    >>> from tempfile import TemporaryDirectory
    >>> from ches_jax import ScoreConfig, score
    >>> with TemporaryDirectory() as folder:
    ...     run = score(ScoreConfig(limit=4, out=f"{folder}/run"), quiet=True)
    ...     _ = select(SelectConfig(scores=run, by="ches", keep="lowest:0.5", out=Path(folder) / "kept"))
    ...     len((Path(folder) / "kept" / "pairs.jsonl").read_text().splitlines())
    2
    """
    require_config("select", config, SelectConfig)
    config = replace(config, scores=fetched_run(place(config.scores), RunError))
    table = open_table(_table(config))
    columns = data_columns(table, config)
    if needs_data(table, config):
        rows = None if rows is None else list(rows)  # read twice
        decision = decide(table, config, source_rows(config, columns) if rows is None else rows)
    else:
        decision = decide(table, config)
    described = describe(table, decision, config)
    with new_directory(output_place(config.out, RunError), RunError, SUMMARY) as folder:
        rows = source_rows(config, columns) if rows is None else rows
        source = _write_rows(folder, rows, table, decision, config)
        scored_with = read_run(config.scores).get("config") or {}
        summary: dict[str, Any] = {
            "rule": {k: getattr(config, k) for k in ("by", "keep", "dedup", "control", "seed")},
            **described,
            "source": {"pairs": config.pairs or scored_with.get("pairs"), **source},
            "scores": table.metadata,
        }
        summary = json_value(summary)
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(summary), encoding="utf-8")
    return summary


def _table(config: SelectConfig) -> Path:
    """The table that has the score: a directory may hold influences beside its scores."""
    beside = Path(config.scores) / INFLUENCE
    return beside if config.by == "influence" and beside.is_file() else config.scores


def _write_rows(
    folder: Path,
    rows: Iterable[SourceRow],
    table: Scores,
    decision: Decision,
    config: SelectConfig,
) -> dict[str, Any]:
    """One pass over the source: each row, checked, to pairs.jsonl or to dropped.jsonl."""
    changed = f"{config.scores}: the pairs file changed since it was scored"
    not_scored = dropped_when_scored(config.scores)
    control = "" if config.control == "none" else f" ({config.control} control)"
    not_chosen = f"not in {config.keep} of {config.by}{control}"
    seen = np.zeros(len(table), dtype=bool)
    reasons: Counter[str] = Counter()
    replaced: set[str] = set()
    digest = hashlib.sha256()
    with (
        open(folder / "pairs.jsonl", "wb", BUFFER) as pairs,
        open(folder / "kept_ids.txt", "w", BUFFER, encoding="utf-8", newline="\n") as kept_ids,
        open(folder / "dropped.jsonl", "wb", BUFFER) as dropped,
    ):
        for row, position, scored_id in joined(rows, table):
            digest.update(f"{row.index} {row.row_id}\n".encode())
            if position is None and key_of(row) not in not_scored:
                raise RunError(f"{changed}: row {row.index} (row_id {row.row_id}) was not in it")
            if position is not None:
                if scored_id != row.row_id:
                    raise RunError(f"{changed}: row {row.index} is {row.row_id}, the table has {scored_id}")
                seen[position] = True
                if decision.kept[position]:
                    added = _added_columns(row, position, decision, config)
                    theirs = {**row.extra, **row.content}
                    if not added.keys().isdisjoint(theirs):
                        replaced |= added.keys() & theirs.keys()
                    pairs.write(json_bytes({**theirs, **added}))
                    kept_ids.write(f"{row.row_id}\n")
                    continue
                reason = decision.repeats.get(position) or (
                    "unscored" if math.isnan(decision.values[position]) else not_chosen
                )
                reasons[reason] += 1
            else:
                reason = f"dropped when scored: {not_scored[key_of(row)]}"
                reasons["dropped when scored"] += 1
            record = {"row_id": row.row_id, "index": row.index, **_candidates(row), "reason": reason}
            dropped.write(json_bytes(record))
    if not seen.all():
        missing = int(np.flatnonzero(~seen)[0])
        raise RunError(
            f"{changed}: {int((~seen).sum())} scored rows are not in it any more, "
            f"the first is row {table['index'][missing].as_py()} (row_id {table['row_id'][missing].as_py()})"
        )
    return {
        "fingerprint": f"sha256:{digest.hexdigest()}",
        "dropped": dict(sorted(reasons.items())),
        "replaced_columns": sorted(replaced),
    }


def _added_columns(row: SourceRow, position: int, decision: Decision, config: SelectConfig) -> dict[str, Any]:
    added: dict[str, Any] = {"row_id": row.row_id, config.by: float(decision.values[position]), **_candidates(row)}
    if row.category is not None:
        added["category"] = row.category
    if decision.weights is not None:
        added["weight"] = float(decision.weights[position])
    return added


def _candidates(row: SourceRow) -> dict[str, int]:
    return dict(zip(CANDIDATES, row.candidates, strict=False)) if row.candidates else {}
