"""Values to select by, and rows that repeat an earlier one: what needs the data beside the score table."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.data.duplicates import NearDuplicates, normalised, pair_texts
from ches_jax.data.prompts import lookup
from ches_jax.errors import RunError
from ches_jax.scores.formulas import numbers, score_column
from ches_jax.scores.table import Scores
from ches_jax.select.config import SelectConfig
from ches_jax.select.expression import as_numbers, evaluated, names, parsed
from ches_jax.select.scored_rows import SourceRow, joined

PREFIX = "column:"
PROBABILITY = "label_probability"
SOFT = "soft_ches"
NAMED = {SOFT: f"{PROBABILITY} * (inner - sqnorm_chosen) + (1 - {PROBABILITY}) * (inner - sqnorm_rejected)"}
"""Expressions that have a name. ``soft_ches`` is the expected CHES when the label is right with the probability of the
data (``scores.formulas.soft_label``), such as ``ches label`` writes."""


def expression_of(by: str) -> str | None:
    """The expression that ``--by`` stands for; None for a score of the table.

    >>> expression_of("column:a-b"), expression_of("ches")
    ('a-b', None)
    """
    return by.removeprefix(PREFIX) if by.startswith(PREFIX) else NAMED.get(by)


def data_columns(table: Scores, config: SelectConfig) -> list[str]:
    """The columns of ``--by column:...`` that the score table does not have, which the data must.

    Raises:
      RunError: no expression, or a column of the table that holds no numbers.
    """
    expression = expression_of(config.by)
    if expression is None:
        return []
    read = names(parsed(expression))
    if not read:
        raise RunError(f"--by {config.by}: names no column")
    for name in read:
        if name in table.schema.names and not _numeric(table.schema.field(name).type):
            raise RunError(f"--by column: {name!r} of the score table holds no numbers")
    return [name for name in read if name not in table.schema.names]


def _numeric(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def read_columns(
    table: Scores, rows: Iterable[SourceRow], columns: list[str], config: SelectConfig
) -> tuple[dict[str, np.ndarray], list[tuple[str, str, str]]]:
    """One pass over the data: numbers by column, and the texts of each row of the table (empty without ``--dedup``).

    Raises:
      RunError: a column that is not there, or holds no numbers.
    """
    values: dict[str, list[Any]] = {name: [None] * len(table) for name in columns}
    texts = [("", "", "")] * len(table) if config.dedup != "none" else []
    known: dict[str, None] = dict.fromkeys(n for n in table.schema.names if _numeric(table.schema.field(n).type))
    for row, position, _ in joined(rows, table):
        if position is None:
            continue
        content = {**row.extra, **row.content}
        known |= dict.fromkeys(content)
        for name, column in values.items():
            column[position] = lookup(content, name)
        if texts:
            texts[position] = pair_texts(row.content)
    return {name: as_numbers(name, column, list(known)) for name, column in values.items()}, texts


def selection_values(table: Scores, config: SelectConfig, data: Mapping[str, np.ndarray]) -> np.ndarray:
    """The score ``--by`` of every row, float64; NaN where the row has none.

    A row that the model pass could not score has no value of any expression either, as for every score.

    Raises:
      RunError: as ``score_column`` and ``expression.parsed``.
    """
    expression = expression_of(config.by)
    if expression is None:
        return score_column(table, config.by, config.seed)
    tree = parsed(expression)
    columns = {name: data[name] if name in data else numbers(table, name) for name in names(tree)}
    if config.by == SOFT:
        _require_probabilities(table, columns[PROBABILITY])
    values = evaluated(tree, columns)
    if "ches" in table.schema.names:
        values = np.where(np.isnan(numbers(table, "ches")), np.nan, values)
    return values


def _require_probabilities(table: Scores, values: np.ndarray) -> None:
    outside = np.flatnonzero((values < 0) | (values > 1))
    if len(outside):
        row, value = table["index"][int(outside[0])].as_py(), values[outside[0]]
        raise RunError(f"--by {SOFT}: row {row} has the {PROBABILITY} {value:g}; expected 0 to 1")


def repeats(texts: list[tuple[str, str, str]], values: np.ndarray, how: str) -> dict[int, str]:
    """Positions of scored rows that repeat an earlier scored row -> why they go; ``how``: none, exact or near."""
    exact: set[tuple[str, ...]] = set()
    near = NearDuplicates() if how == "near" else None
    reasons: dict[int, str] = {}
    for position, row in enumerate(texts):
        if np.isnan(values[position]):
            continue
        key = tuple(map(normalised, row))
        if key in exact:
            reasons[position] = "repeats an earlier row"
        elif near is not None and near.first_like(str(position), *row) is not None:
            reasons[position] = "nearly repeats an earlier row"
        exact.add(key)
    return reasons
