r"""From scores to a preference dataset: which rows to keep, or how much each shall weigh.

The grammar of ``--keep`` (n counts the rows that have a score; ties keep the order of the input):

  lowest:0.05  highest:0.05   a share of n in (0, 1]: with a point, an exponent or a percent sign
  lowest:19    highest:19     a number of rows: an integer (lowest:1 is one row, lowest:1.0 all)
  window:0.5,512              512 rows around the quantile 0.5, by the paper's procedure
  quantile:0,0.25             rows between two quantiles of the score, both ends included
  below:-10    above:-10      rows strictly on one side of a value
  soft:0.5                    all rows, with a column ``weight``

A share becomes a number of rows by rounding half up, at least one: 5% of 370 rows are 19, as in the
paper.

Source of the window and of the 5%: Razin et al., Unintentional Unalignment
(https://arxiv.org/abs/2410.08847), Sections 5 and 6 and their official code.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from ches_jax import embedded
from ches_jax.errors import RunError
from ches_jax.options import Columns
from ches_jax.runlog import CONFIG, RUN, read_json
from ches_jax.scores.derive import numbers, score_column, spearman
from ches_jax.scores.table import read_table, table_path

Control = Literal["none", "random", "length"]

# --- the rule ------------------------------------------------------------------------------------

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SHAPES = {
    "lowest": rf"{_NUMBER}%?",
    "highest": rf"{_NUMBER}%?",
    "window": rf"{_NUMBER},\d+",
    "quantile": rf"{_NUMBER},{_NUMBER}",
    "below": _NUMBER,
    "above": _NUMBER,
    "soft": _NUMBER,
}
_EXAMPLES = "lowest:0.05, lowest:19, highest:0.05, window:0.5,512, quantile:0,0.25, below:-10, above:-10, soft:0.5"


@dataclass(frozen=True, slots=True)
class Rule:
    """A parsed ``--keep``."""

    text: str
    kind: str
    numbers: tuple[Decimal, ...]
    is_count: bool = False
    """Whether the number of ``lowest`` and ``highest`` counts rows; otherwise it is a share."""


def parse_rule(text: str) -> Rule:
    """Reads the grammar of ``--keep`` (see the module's docstring).

    >>> parse_rule("lowest:19").is_count, parse_rule("lowest:0.05").is_count
    (True, False)
    """
    kind, _, rest = text.strip().partition(":")
    rest = rest.replace(" ", "")
    if kind not in _SHAPES or not re.fullmatch(_SHAPES[kind], rest):
        raise RunError(f"--keep {text!r} is not a rule; expected one of: {_EXAMPLES}")
    values = tuple(Decimal(part.rstrip("%")) for part in rest.split(","))
    if rest.endswith("%"):
        values = (values[0] / 100,)
    rule = Rule(text.strip(), kind, values, is_count=bool(re.fullmatch(r"[+-]?\d+", rest)))
    if problem := _out_of_range(rule):
        raise RunError(f"--keep {text!r}: {problem}")
    return rule


def _out_of_range(rule: Rule) -> str | None:
    first, last = rule.numbers[0], rule.numbers[-1]
    match rule.kind:
        case "lowest" | "highest" if rule.is_count and first < 1:
            return f"the number of rows must be at least 1, got {first}"
        case "lowest" | "highest" if not rule.is_count and not 0 < first <= 1:
            return f"the share must be above 0 and at most 1, got {first} (rows: an integer)"
        case "window" if not 0 <= first <= 1 or last < 1:
            return f"the quantile must be in [0, 1] and the width at least 1, got {first} and {last}"
        case "quantile" if not 0 <= first <= last <= 1:
            return f"the quantiles must be in [0, 1], the lower first, got {first} and {last}"
        case "soft" if not 0 <= first < 1:
            return f"the weight at the 95th percentile must be in [0, 1), got {first}"
    return None


# --- which rows: pure ----------------------------------------------------------------------------


def window_range(n: int, quantile: float, width: int) -> tuple[int, int]:
    """Ranks [start, stop) of the paper's window around a quantile of n sorted rows.

    ``idx = round(q (n - 1))`` (halves to even), ``start = max(0, idx - K // 2)``, ``end = start +
    K``, shifted back where it passes the end; all rows when K exceeds n.

    >>> window_range(5000, 0.25, 512), window_range(5000, 1.0, 512)
    ((994, 1506), (4488, 5000))
    """
    middle = round(quantile * (n - 1))
    stop = max(0, middle - width // 2) + width
    if stop > n:
        return max(0, n - width), n
    return stop - width, stop


def amount(rule: Rule, n: int) -> int:
    """How many of n rows ``lowest`` or ``highest`` keeps."""
    if rule.is_count:
        if (count := int(rule.numbers[0])) > n:
            raise RunError(f"--keep {rule.text!r}: asks for {count} rows, {n} have a score")
        return count
    # In decimals, so that 0.05 of 370 is 18.5 and not a binary neighbour of it.
    return min(n, max(1, int((rule.numbers[0] * n).to_integral_value(ROUND_HALF_UP))))


def scored_order(values: np.ndarray) -> np.ndarray:
    """Positions of the rows that have a score, from the lowest score up; ties in input order."""
    scored = np.flatnonzero(np.isfinite(values))
    return scored[np.argsort(values[scored], kind="stable")]


def keep_indices(values: np.ndarray, rule: Rule | str) -> np.ndarray:
    """The positions that a rule keeps, ascending. Rows without a score (NaN) are never kept.

    >>> keep_indices(np.array([3.0, 1.0, np.nan, 2.0]), "lowest:2")
    array([1, 3])
    """
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    values = np.asarray(values, dtype=np.float64)
    order = scored_order(values)
    n = len(order)
    if n == 0:
        return order
    first, last = float(rule.numbers[0]), float(rule.numbers[-1])
    match rule.kind:
        case "lowest":
            kept = order[: amount(rule, n)]
        case "highest":
            kept = order[n - amount(rule, n) :]
        case "window":
            kept = order[slice(*window_range(n, first, int(last)))]
        case "quantile":
            low, high = np.quantile(values[order], [first, last])
            kept = order[(values[order] >= low) & (values[order] <= high)]
        case "below":
            kept = order[values[order] < first]
        case "above":
            kept = order[values[order] > first]
        case _:
            kept = order
    return np.sort(kept)


def soft_weights(values: np.ndarray, target: float) -> tuple[np.ndarray, float]:
    r"""Weights that fall as the score rises: 1 up to score 0, ``target`` at the 95th percentile.

    .. math:: w = \mathrm{clip}(1 - a s, 0, 1), \qquad a = (1 - \mathrm{target}) / p_{95}(s)

    Returns:
      The weights (NaN where there is no score), and the slope a in units of 1 / score.

    Raises:
      RunError: the 95th percentile is not positive, so that no slope gives it the target.
    """
    scored = values[np.isfinite(values)]
    if scored.size == 0:
        return np.full(values.shape, np.nan), 0.0
    p95 = float(np.quantile(scored, 0.95))
    if p95 <= 0:
        raise RunError(
            f"--keep soft:{target:g}: the 95th percentile of the score is {p95:.4g}; soft weights "
            "need a positive one (a score of 0 or less weighs 1). Use lowest: or quantile: instead"
        )
    slope = (1.0 - target) / p95
    return np.clip(1.0 - slope * values, 0.0, 1.0), slope


def stand_ins(values: np.ndarray, control: Control, longer_rejected: np.ndarray, seed: int) -> np.ndarray:
    """For each row, the row that takes its place in a control; -1 for rows without a score.

    The rows in order of score are set against the rows in another order, rank by rank: the row of
    rank r is replaced by the row of rank r there. So a control keeps the same number (and the same
    weights) under every rule.

    - ``random``: the other order is a seeded shuffle.
    - ``length``: it is by ``rejected_tokens - chosen_tokens``, in the direction in which that
      difference goes with the score (the sign of their Spearman correlation; rising when it is 0 or
      undefined, as plain CHES rises when the rejected response is longer). Ties are shuffled by the
      seed. Where a score is nothing but length, this control keeps the same rows, up to ties.
    """
    own = scored_order(values)
    other = np.random.default_rng(seed).permutation(own)
    if control == "length":
        direction = -1 if spearman(values, longer_rejected) < 0 else 1
        other = other[np.argsort(direction * longer_rejected[other], kind="stable")]
    places = np.full(len(values), -1, dtype=np.int64)
    places[own] = own if control == "none" else other
    return places


# --- the decision for a table --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig:
    """What ``ches select`` does."""

    scores: Path
    """A directory of ``ches score``, or its scores.parquet."""
    out: Path
    """The directory to write; must not exist, or be empty."""
    by: str = "ln_ches"
    """The score: ches, ln_ches, head_score, last_hidden_inner, cosine, swapped, minus_edit_distance, projection,
    logp_margin, chosen_tokens or random; the more similar a pair, the higher."""
    keep: str = "lowest:0.05"
    """Which rows: lowest:0.05 (a share), lowest:19 (rows), highest:0.05, window:0.5,512 (quantile, rows),
    quantile:0,0.25, below:-10, above:-10, or soft:0.5 (all rows, weighted)."""
    control: Control = "none"
    """To compare with: as many rows, by chance (random) or by response length alone (length)."""
    seed: int = 0
    """Of the controls and of ``--by random``."""
    pairs: str | None = None
    """The pairs that were scored; taken from the run when not given."""
    split: str | None = None
    """Which split of them; taken from the run when not given."""
    columns: Columns = field(default_factory=dict)
    """Other names of columns (prompt=instruction); taken from the run when not given."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to each row of the table."""

    values: np.ndarray
    """The score, NaN where there is none."""
    kept: np.ndarray
    """True where the row is kept."""
    weights: np.ndarray | None
    soft: dict[str, float] | None


def decide(table: pa.Table, config: SelectConfig) -> Decision:
    """Applies the rule, and the control when there is one.

    Raises:
      RunError: unknown score or rule, no row has the score, or the rule keeps none.
    """
    rule = parse_rule(config.keep)
    values = score_column(table, config.by, config.seed)
    scored = values[np.isfinite(values)]
    if scored.size == 0:
        raise RunError(f"{config.scores}: none of its {len(table)} rows has the score {config.by!r}")
    chosen = keep_indices(values, rule)
    if chosen.size == 0:
        raise RunError(
            f"--keep {rule.text!r} keeps none of {scored.size} rows: "
            f"{config.by} runs from {scored.min():.6g} to {scored.max():.6g}"
        )
    longer = numbers(table, "rejected_tokens") - numbers(table, "chosen_tokens")
    places = stand_ins(values, config.control, longer, config.seed)
    kept = np.zeros(len(table), dtype=bool)
    kept[places[chosen]] = True
    if rule.kind != "soft":
        return Decision(values, kept, None, None)
    plain, slope = soft_weights(values, float(rule.numbers[0]))
    weights = np.full(len(table), np.nan)
    weights[places[chosen]] = plain[chosen]
    total = numbers(table, "rejected_tokens") + numbers(table, "chosen_tokens")
    soft = {
        "slope": slope,
        "effective_mass": float(np.nansum(weights) / scored.size),
        "fraction_zero": float((weights[kept] == 0).mean()),
        "spearman_weight_length_difference": spearman(weights, longer),
        "spearman_weight_total_length": spearman(weights, total),
    }
    return Decision(values, kept, weights, soft)


def describe(table: pa.Table, decision: Decision, config: SelectConfig) -> dict[str, Any]:
    """The numbers of a selection: counts, ranges, lengths of kept rows and of all, categories."""
    scored = np.isfinite(decision.values)
    tokens = {name: numbers(table, name) for name in ("chosen_tokens", "rejected_tokens")}
    longer = tokens["rejected_tokens"] - tokens["chosen_tokens"]

    def lengths(rows: np.ndarray) -> dict[str, float]:
        means = {name: float(values[rows].mean()) for name, values in tokens.items()}
        return means | {"rejected_minus_chosen": float(longer[rows].mean())}

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
        "mean_lengths": {"kept": lengths(decision.kept), "all": lengths(scored)},
        "spearman_score_length_difference": spearman(decision.values, longer),
        "soft": decision.soft,
    }
    if "category" in table.schema.names:
        names = np.array([name or "" for name in table["category"].to_pylist()], dtype=object)
        numbers_told["categories"] = {
            name: {
                "scored": int((scored & (names == name)).sum()),
                "kept": int((decision.kept & (names == name)).sum()),
            }
            for name in sorted(set(names))
        }
    return numbers_told


def _range(values: np.ndarray) -> list[float]:
    return [float(np.nanmin(values)), float(np.nanmax(values))]


# --- files ---------------------------------------------------------------------------------------


class SourceRow(Protocol):
    """A row of the pairs as ``data.sources`` gives it."""

    @property
    def index(self) -> int: ...
    @property
    def row_id(self) -> str: ...
    @property
    def content(self) -> Mapping[str, Any]: ...
    @property
    def category(self) -> str | None: ...


def read_run(scores: Path | str) -> dict[str, Any]:
    """The ``run.json`` beside a score table, with its ``config``; empty when there is neither."""
    folder = table_path(scores).parent
    run = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    if not run.get("config") and (folder / CONFIG).is_file():
        run["config"] = read_json(folder / CONFIG)
    return run


def dropped_when_scored(scores: Path | str) -> dict[int, str]:
    """Reasons by index of the rows that the score run dropped (``data.audit.dropped_record``)."""
    path = table_path(scores).with_name("dropped.jsonl")
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        return {int(row["index"]): ", ".join(row["reasons"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: is damaged ({error!r})") from None


def source_rows(config: SelectConfig) -> Iterator[SourceRow]:
    """The rows that were scored, from the source named in the run or in the configuration."""
    from ches_jax.data.sources import open_pairs

    told = read_run(config.scores).get("config") or {}
    pairs = config.pairs or told.get("pairs")
    if not pairs:
        raise RunError(f"{config.scores}: no run.json names the pairs that were scored; pass --pairs")
    if pairs == "embedded":  # the word of ScoreConfig.pairs
        pairs = str(embedded.pairs_file())
    split, columns = config.split or told.get("split"), config.columns or told.get("columns")
    rows = open_pairs(pairs, split, columns)
    return itertools.islice(rows, told.get("limit"))


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory, renamed to ``out`` when the block ends well, removed when not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: exists and is not an empty directory; choose another --out")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)  # replaces an empty directory too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """
    table, metadata = read_table(config.scores)
    decision = decide(table, config)
    with new_directory(Path(config.out)) as folder:
        rows = source_rows(config) if rows is None else rows
        source = _write_rows(folder, rows, table, decision, config)
        told = read_run(config.scores).get("config") or {}
        summary: dict[str, Any] = {
            "rule": {k: getattr(config, k) for k in ("by", "keep", "control", "seed")},
            **describe(table, decision, config),
            "source": {"pairs": config.pairs or told.get("pairs"), **source},
            "scores": metadata,
        }
        summary = _plain(summary)
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "selection.json").write_text(text + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(summary), encoding="utf-8")
    return summary


def _write_rows(
    folder: Path,
    rows: Iterable[SourceRow],
    table: pa.Table,
    decision: Decision,
    config: SelectConfig,
) -> dict[str, Any]:
    """One pass over the source: each row, checked, to pairs.jsonl or to dropped.jsonl."""
    changed = f"{config.scores}: the pairs file changed since it was scored"
    ids = table["row_id"].to_pylist()
    place = {index: position for position, index in enumerate(table["index"].to_pylist())}
    not_scored = dropped_when_scored(config.scores)
    seen = np.zeros(len(table), dtype=bool)
    reasons: Counter[str] = Counter()
    replaced: set[str] = set()
    digest = hashlib.sha256()
    with (
        open(folder / "pairs.jsonl", "wb") as pairs,
        open(folder / "kept_ids.txt", "w", encoding="utf-8", newline="\n") as kept_ids,
        open(folder / "dropped.jsonl", "wb") as dropped,
    ):
        for row in rows:
            digest.update(f"{row.index} {row.row_id}\n".encode())
            position = place.get(row.index)
            if position is None and row.index not in not_scored:
                raise RunError(f"{changed}: row {row.index} (row_id {row.row_id}) was not in it")
            if position is not None and ids[position] != row.row_id:
                raise RunError(f"{changed}: row {row.index} is {row.row_id}, the table has {ids[position]}")
            if position is not None:
                seen[position] = True
            if position is not None and decision.kept[position]:
                added = _added_columns(row, position, decision, config)
                replaced |= added.keys() & row.content.keys()
                pairs.write(_json_line(dict(row.content) | added, row.index))
                kept_ids.write(f"{row.row_id}\n")
                continue
            reason = _reason(position, not_scored.get(row.index), decision, config)
            reasons[reason.split(":", 1)[0] if position is None else reason] += 1
            told = {"row_id": row.row_id, "index": row.index, "reason": reason}
            dropped.write(_json_line(told, row.index))
    if not seen.all():
        missing = int(np.flatnonzero(~seen)[0])
        raise RunError(
            f"{changed}: {int((~seen).sum())} scored rows are not in it any more, "
            f"the first is row {table['index'][missing].as_py()} (row_id {ids[missing]})"
        )
    return {
        "fingerprint": f"sha256:{digest.hexdigest()}",
        "dropped": dict(sorted(reasons.items())),
        "replaced_columns": sorted(replaced),
    }


def _added_columns(row: SourceRow, position: int, decision: Decision, config: SelectConfig) -> dict[str, Any]:
    added: dict[str, Any] = {"row_id": row.row_id, config.by: float(decision.values[position])}
    if row.category is not None:
        added["category"] = row.category
    if decision.weights is not None:
        added["weight"] = float(decision.weights[position])
    return added


def _reason(position: int | None, when_scored: str | None, decision: Decision, config: SelectConfig) -> str:
    if position is None:
        return f"dropped when scored: {when_scored}"
    if np.isnan(decision.values[position]):
        return "unscored"
    control = "" if config.control == "none" else f" ({config.control} control)"
    return f"not in {config.keep} of {config.by}{control}"


def _plain(value: Any) -> Any:
    """``value`` with only what JSON knows: numpy scalars opened, dates as text, NaN as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _json_line(content: Mapping[str, Any], index: int) -> bytes:
    plain = _plain(content)
    try:
        return (json.dumps(plain, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no UTF-8 for it, but JSON can escape it
        return (json.dumps(plain) + "\n").encode()


# --- the card ------------------------------------------------------------------------------------

_HEADER = """\
---
tags:
- preference
- dpo
- ches
configs:
- config_name: default
  data_files:
  - split: train
    path: pairs.jsonl
---
"""

_CAUTION = """\
## Before you use it

- A score is a property of a pair *on one model*. Score again for another model.
- CHES grows with the rejected response's length. Compare with `--control length` and
  `--control random`, which keep as many rows.
- Whether to drop the most similar pairs is debated. The paper found that training on the pairs with
  the lowest length-normalised CHES kept a model from unlearning refusals; others advise pairs that
  differ as little as possible on the surface. Filtering does not stop displacement as such.
"""


def card(summary: Mapping[str, Any]) -> str:
    """The dataset card: what was kept, by which rule, from which scores; cautions."""
    rule, counts, lengths = summary["rule"], summary["counts"], summary["mean_lengths"]
    share = counts["kept"] / counts["scored"]
    kept_range, all_range = summary["score_range"]["kept"], summary["score_range"]["all"]
    lines = [
        "# A selection of preference pairs",
        "",
        f"{counts['kept']} of {counts['scored']} scored rows ({share:.2%}), by `{rule['keep']}` of "
        f"`{rule['by']}`; control: {rule['control']}; seed {rule['seed']}.",
        "",
        f"- {rule['by']} of the kept rows: {kept_range[0]:.6g} to {kept_range[1]:.6g} "
        f"(all: {all_range[0]:.6g} to {all_range[1]:.6g})",
        *(f"- dropped, {_cell(reason)}: {n}" for reason, n in summary["source"]["dropped"].items()),
    ]
    if soft := summary["soft"]:
        lines += [f"- soft weights, {name.replace('_', ' ')}: {_number(v)}" for name, v in soft.items()]
    lines += ["", "## Length shift", "", "| mean tokens | kept | all |", "|---|---|---|"]
    lines += [f"| {n} | {lengths['kept'][n]:.1f} | {lengths['all'][n]:.1f} |" for n in lengths["all"]]
    rho = summary["spearman_score_length_difference"]
    lines += ["", f"Spearman({rule['by']}, rejected - chosen tokens) over all rows: {_number(rho)}"]
    if categories := summary.get("categories"):
        lines += ["", "## Categories", "", "| category | kept | scored |", "|---|---|---|"]
        lines += [f"| {_cell(c)} | {n['kept']} | {n['scored']} |" for c, n in categories.items()]
    lines += ["", "## Provenance", "", "| | |", "|---|---|"]
    source = {f"source {k}": summary["source"][k] for k in ("pairs", "fingerprint")}
    provenance = source | {f"scores {k}": v for k, v in summary["scores"].items()}
    lines += [f"| {_cell(k)} | {_cell(v)} |" for k, v in provenance.items() if v is not None]
    return _HEADER + "\n".join(lines) + "\n\n" + _CAUTION


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


def _cell(value: Any) -> str:
    """Text from outside in a Markdown table: one line, its own marks switched off."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split()) or "(none)"
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
