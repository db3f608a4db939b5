"""``ches select``: a score table and a rule (``rules``) to a preference dataset that tells how it was chosen."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.data.sources import at_a_time
from ches_jax.errors import RunError, require_config
from ches_jax.runs.files import new_directory
from ches_jax.runs.json_text import json_value
from ches_jax.runs.store import fetched_run, output_place, place
from ches_jax.scores.formulas import numbers
from ches_jax.scores.table import INFLUENCE, Scores, open_table, words
from ches_jax.select.columns import data_columns, read_columns, repeats, selection_values
from ches_jax.select.config import SelectConfig
from ches_jax.select.dataset_card import card
from ches_jax.select.keep import keep_indices, matched_control, parse_rule, soft_weights
from ches_jax.select.scored_rows import SourceRow, read_run, source_blocks, source_rows
from ches_jax.select.write import Decision, write_rows
from ches_jax.stats import spearman

SUMMARY = "selection.json"


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
    if config.seed < 0:
        raise RunError(f"--seed {config.seed}: expected 0 or more")
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
        blocks = source_blocks(config, columns) if rows is None else at_a_time(rows)
        source = write_rows(folder, blocks, table, decision, config)
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
