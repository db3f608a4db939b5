"""The page of a score run: which pairs stand out, which score says so, and all pairs in one table."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.errors import RunError
from ches_jax.report import elements, essays, svg, tables
from ches_jax.report.axes import axis, digits_of, readable
from ches_jax.report.document import Page, Section, Tone
from ches_jax.report.html import data_table, escape, figure, folded, gallery, paragraphs
from ches_jax.report.pair_table import MOST_TEXTS, WHOLE, Column, Ids, Numbers, PairTable, Words
from ches_jax.report.provenance import model_name, provenance, read_record, short_path
from ches_jax.report.summary import correlation
from ches_jax.report.texts import read_texts, token_table
from ches_jax.scores.formulas import SCORES, numbers, score_column
from ches_jax.scores.leading import LOW_IS_WORSE, Leading, leading_score
from ches_jax.scores.table import INFLUENCE, Scores, StoredTable, open_table, table_path, words
from ches_jax.select.scored_rows import SourceRow, dropped_when_scored, read_run
from ches_jax.stats import QUANTILES, spearman

TOKENS_OF = 300
"""Pairs that have heat maps, from the riskier end."""
LABELS = {
    "ches": "CHES",
    "ln_ches": "ln-CHES",
    "head_score": "head score",
    "last_hidden_inner": "last hidden inner product",
    "cosine": "cosine",
    "swapped": "CHES, sides swapped",
    "minus_edit_distance": "minus edit distance",
    "projection": "projection",
    "logp_margin": "log-probability margin",
    "chosen_tokens": "chosen tokens",
    "rejected_tokens": "rejected tokens",
    "prompt_tokens": "prompt tokens",
    "shared_prefix_tokens": "shared tokens",
    "edit_distance": "edit distance",
    "logp_chosen": "ln π chosen",
    "logp_rejected": "ln π rejected",
    "forecast_chosen": "forecast chosen",
    "forecast_rejected": "forecast rejected",
    "influence": "influence",
    "from_chosen": "influence, from chosen",
    "from_rejected": "influence, from rejected",
}
"""What the page calls a column."""
SIGNED = ("forecast_chosen", "forecast_rejected", "influence", "from_chosen", "from_rejected", "logp_margin")
TABLE = ("ches", "ln_ches", "forecast_chosen", "influence", "chosen_tokens", "rejected_tokens")
"""Columns of the table beside the leading score; the others stand with the unfolded pair."""


def label(name: str) -> str:
    """What the page calls a column.

    >>> label("head_score"), label("something_new")
    ('head score', 'something new')
    """
    return LABELS.get(name, name.replace("_", " "))


def score_page(run_dir: Path | str, rows: Iterable[SourceRow] | None = None) -> Page:
    """The page of a directory of ``ches score``.

    Args:
      run_dir: the directory (``scores.parquet``; ``run.json``, ``dropped.jsonl``, ``token_scores.parquet``,
        ``forecast.parquet`` and ``influence.parquet`` where there are any).
      rows: the rows that were scored, for their texts; opened from the run when not given.

    Raises:
      RunError: not a directory of a score run, or its table has no rows.
    """
    run_dir = table_path(run_dir).parent
    table, joined, leading = _opened(run_dir)
    values = joined[leading.name] if leading.name in joined else score_column(table, leading.name)
    low_is_worse = leading.name in LOW_IS_WORSE
    risky = -values if low_is_worse else values
    cut, beyond = stands_out(risky)
    standing = len(beyond)
    del beyond  # of a million pairs nothing is kept that is not needed any more
    dropped = dropped_when_scored(run_dir)
    record = read_record(run_dir)
    config = read_run(run_dir).get("config") or {}
    scored = run_dir / INFLUENCE if leading.name in joined else run_dir
    command = f"ches select --scores {elements.quoted(scored)} --by {leading.name} --keep below:VALUE --out kept"
    pairs, notes = _with_texts(_pair_table(run_dir, table, joined, leading.name), run_dir, table, rows)
    name = label(leading.name)
    top = [p for p in pairs.leading_rows()[:3].tolist() if np.isfinite(risky[p])]
    links = ", ".join(elements.row_link(pairs, p) for p in top)
    worst = f"Most at risk: {links}." if leading.name in joined else f"Highest: {links}."
    lengths = ("rejected minus chosen tokens", "the total length")
    by_length = {name: spearman(risky, of) for name, of in zip(lengths, tables.differences(table), strict=True)}
    kept = _standing_words(standing, len(table), name)
    bound = readable(-cut if low_is_worse else cut, digits_of(values))
    answers = [
        (
            "What stands out?",
            f"{escape(kept)}. The bound is {bound}: 1.5 times the width of the middle half of the pairs beyond it. "
            f"{worst}",
        ),
        (
            "Which score sorts the pairs?",
            f'{escape(name[0].upper() + name[1:])}: {escape(leading.why)}. <a href="#reading">How to read it</a>.',
        ),
        ("Is it length?", _length_words(name, by_length)),
        ("Is the data sound?", _data_words(table, dropped)),
        (
            "What next?",
            'Look at the pairs <a href="#pairs">in the table</a>, then set a <a href="#distribution">threshold</a> and '
            "compare with a control of equal size (<code>--control random</code>, <code>--control length</code>).",
        ),
    ]
    first = [_threshold_figure(leading.name, values, command if leading.name in SCORES else "")]
    first.append(
        elements.scatter(
            "scores", "Two numbers of each pair", pairs, _other_axis(pairs, leading.name), leading.name, choose=True
        )
    )
    by_category = _categories(table, leading.name, values)
    del values, risky
    sections = [
        Section(anchor="distribution", heading="How the pairs are spread", body=gallery(first)),
        Section(anchor="pairs", heading="All pairs", body=elements.table_body()),
        Section(anchor="categories", heading="Categories", body=by_category),
        Section(anchor="scores", heading="Scores and lengths", body=_scores_section(table, leading.name)),
        Section(anchor="health", heading="Data health", body=health(table, Counter(dropped.values()))),
        Section(
            anchor="reading", heading="What the scores are and how to read them", body=_reading(table), folded=True
        ),
        Section(anchor="limits", heading="What this does not show", body=paragraphs(*essays.SCORE_LIMITS), folded=True),
        provenance(record, {"scores": table.metadata}),
    ]
    data = short_path(config.get("pairs")) or "pairs"
    tone: Tone = "unsure" if standing else "plain"
    return Page(
        kind="ches score",
        title=f"{standing} of {len(table)} pairs stand out: {data}",
        headline=kept,
        subtitle=elements.subtitle(
            model_name(record), data, f"{tables.scored_rows(table):,} pairs scored", str(run_dir)
        ),
        answers=answers,
        tone=tone,
        notes=notes,
        sections=[s for s in sections if s.body],
        pairs=pairs,
    )


def _opened(run_dir: Path) -> tuple[StoredTable, dict[str, np.ndarray], Leading]:
    """The table of a run, the columns of other tables beside it, and the score that leads."""
    table = open_table(run_dir)
    if not len(table):
        raise RunError(f"{run_dir}: the score table has no rows; there is nothing to report")
    joined = elements.joined(run_dir, Ids(table))
    leading = leading_score([*tables.shown_scores(table), *joined])
    if leading is None:
        raise RunError(
            f"{run_dir}: the score table has no score this page knows; it has {', '.join(table.column_names)}"
        )
    return table, joined, leading


def one_pair(run_dir: Path, find: Callable[[PairTable], int]) -> tuple[PairTable, int, list[str]]:
    """The pairs of a run, the position that ``find`` finds, the only one that has its texts and tokens; and notes."""
    table, joined, leading = _opened(run_dir)
    pairs = _pair_table(run_dir, table, joined, leading.name)
    position = find(pairs)
    shown = np.zeros(pairs.rows, dtype=bool)
    shown[position] = True
    texts, note = read_texts(run_dir, table, None, shown, np.array([position]))
    tokens = token_table(run_dir, table, [position], texts)
    return dataclasses.replace(pairs, texts=texts, tokens=tokens), position, [note] if note else []


def stands_out(values: np.ndarray) -> tuple[float, np.ndarray]:
    """The upper fence of some scores (Tukey's: upper quartile and 1.5 interquartile ranges), and who is beyond.

    >>> bound, beyond = stands_out(np.array([1.0, 2.0, 3.0, 4.0, 50.0]))
    >>> bound, beyond.tolist()
    (7.0, [4])
    """
    finite = values[np.isfinite(values)]
    if finite.size < 4:
        return float("nan"), np.empty(0, dtype=np.int64)
    q25, q75 = np.quantile(finite, [0.25, 0.75], overwrite_input=True)
    bound = float(q75 + 1.5 * (q75 - q25))
    return bound, np.flatnonzero(values > bound)


def _standing_words(count: int, pairs: int, name: str) -> str:
    """How many stand out, as a sentence without its full stop.

    >>> _standing_words(1, 20, "CHES"), _standing_words(0, 20, "CHES")
    ('1 of 20 pairs stands out by CHES', 'None of 20 pairs stands out by CHES')
    """
    verb = "stand" if count > 1 else "stands"
    return f"{f'{count:,}' if count else 'None'} of {pairs:,} pairs {verb} out by {name}"


def _length_words(name: str, found: Mapping[str, float]) -> str:
    known = {words: rho for words, rho in found.items() if not np.isnan(rho)}
    if not known:
        return "The lengths of the responses, or the scores, do not vary."
    strongest = max(abs(rho) for rho in known.values())
    answer = "To a large part." if strongest > 0.6 else "In part." if strongest > 0.3 else "Hardly."
    numbers_told = ", ".join(f"{correlation(rho)} with {words}" for words, rho in known.items())
    advice = " Compare with <code>--control length</code>." if strongest > 0.3 else ""
    return f'<span class="tones">{answer}</span> Rank correlation of {escape(name)}: {numbers_told}.{advice}'


def _data_words(table: Scores, dropped: Mapping[Any, str]) -> str:
    unscored = len(table) - tables.scored_rows(table)
    sentence = (
        f"{len(dropped):,} rows dropped before scoring, {tables.flagged_rows(table):,} flagged, "
        f"{unscored:,} without a score."
    )
    return f'{escape(sentence)} <a href="#health">Data health</a>.'


def _threshold_figure(name: str, values: np.ndarray, command: str) -> str:
    """The histogram of the leading score, with a line that cuts it and the command that follows."""
    low, _, q25, median, q75, _, high = (readable(v, digits_of(values)) for v in tables.quantiles(values))
    alt = f"Histogram of {label(name)}: from {low} to {high}, median {median}, middle half {q25} to {q75}."
    drawn = svg.histogram(values, x=label(name))
    below, above = axis(values).outside(values[np.isfinite(values)])
    beyond = "".join(
        f"The {bar} bar holds {n:,} that lie beyond the frame. " for bar, n in (("first", below), ("last", above)) if n
    )
    caption = f"{beyond}Set the line with the slider or by a click."
    body = figure(f"histogram_{name}", f"Distribution of {label(name)}", drawn, alt, caption)
    if not command:
        return body
    place = '<label class="soft">threshold<input type="range" min="0" max="1000" value="900"></label>'
    line = '<button type="button" class="look">show these pairs in the table</button>'
    control = (
        f'<div class="controls">{place}<output class="grow"></output>{line}</div>'
        f'<p class="soft">keeps the pairs below the line:</p><div class="command"><code>{escape(command)}</code></div>'
    )
    opened = f'<figure data-threshold="{escape(name)}" data-command="{escape(command)}"'
    return body.replace("<figure", opened, 1).replace("</figure>", f"{control}</figure>", 1)


def _other_axis(pairs: PairTable, leading: str) -> str:
    names = [c.name for c in pairs.columns if c.kind == "number"]
    wanted = ("rejected_minus_chosen", "chosen_tokens", "ches", "ln_ches")
    return next((n for n in wanted if n in names and n != leading), names[0])


def _pair_table(run_dir: Path, table: Scores, joined: Mapping[str, np.ndarray], leading: str) -> PairTable:
    names = table.schema.names
    made: dict[str, Callable[[], np.ndarray]] = {n: partial(score_column, table, n) for n in tables.shown_scores(table)}
    lengths = [n for n in ("chosen_tokens", "rejected_tokens", "prompt_tokens", "shared_prefix_tokens") if n in names]
    as_stored = [*lengths, *(n for n in ("logp_chosen", "logp_rejected") if n in names)]
    made |= {n: partial(numbers, table, n) for n in as_stored}
    if {"chosen_tokens", "rejected_tokens"} <= set(names):
        made["rejected_minus_chosen"] = lambda: tables.differences(table)[0]
    numeric: dict[str, Sequence[Any] | np.ndarray] = {**joined, **{n: Numbers(len(table), f) for n, f in made.items()}}
    ordered = [leading, *(n for n in TABLE if n in numeric and n != leading)]
    ordered += [n for n in numeric if n not in ordered]
    columns = [
        Column(
            name="index",
            label="row",
            values=Numbers(len(table), lambda: table["index"].to_numpy()),
            down=False,
            meaning="row of the data, from 0",
        )
    ]
    for name in ("chosen_candidate", "rejected_candidate"):
        if name in names:
            numbered = Words(*words(table, name))
            columns.append(Column(name=name, label=label(name), values=numbered, kind="word", shown=False))
    for name in ordered:
        unit = (
            "nats"
            if name.startswith(("logp", "forecast"))
            else "tokens"
            if name.endswith(("tokens", "minus_chosen"))
            else ""
        )
        shown = name in TABLE or name == leading
        columns.append(
            Column(
                name=name,
                label=label(name),
                values=numeric[name],
                meaning=SCORES[name].meaning if name in SCORES else "",
                unit=unit,
                signed=name in SIGNED,
                minor=name != leading,
                shown=shown,
                down=name not in LOW_IS_WORSE,
            )
        )
    for name in ("category", "flags"):
        if name in names:
            given = Words(*words(table, name))
            if any(given.names):
                columns.append(
                    Column(name=name, label=name, values=given, kind="word", minor=True, shown=name == "category")
                )
    key = ["index", *(n for n in ("chosen_candidate", "rejected_candidate") if n in names)]
    return PairTable(
        name=f"{run_dir.name}_pairs",
        rows=len(table),
        columns=columns,
        key=key,
        sort=(leading, 1 if leading in LOW_IS_WORSE else -1),
        row_ids=Ids(table),
        show=elements.show_command(run_dir),
        show_key="index",
    )


def _with_texts(
    pairs: PairTable, run_dir: Path, table: Scores, rows: Iterable[SourceRow] | None
) -> tuple[PairTable, list[str]]:
    """The table with the texts of ``MOST_TEXTS`` pairs, at both ends of its order, and with token scores; and notes."""
    order, most = pairs.leading_rows(), MOST_TEXTS
    shown = np.ones(pairs.rows, dtype=bool)
    shown[order[most - most // 2 : pairs.rows - most // 2]] = False
    first, last = order[: max(WHOLE, TOKENS_OF)].copy(), order[-WHOLE:].copy()
    del order
    texts, note = read_texts(run_dir, table, rows, shown, np.concatenate([first, last]))
    notes = [note] if note else []
    if texts and not shown.all():
        notes.append(
            f"Of {pairs.rows:,} pairs the {most:,} at both ends of the table's order have their texts on this page; "
            f"{pairs.show} ROW prints those of any."
        )
    tokens = token_table(run_dir, table, first[:TOKENS_OF].tolist(), texts)
    left_out = None if shown.all() or not texts else ~shown
    return dataclasses.replace(pairs, texts=texts, left_out=left_out, tokens=tokens), notes


def _categories(table: Scores, leading: str, values: np.ndarray) -> str:
    found = tables.category_rows(table)
    if not found:
        return ""
    by = str(tables.separating_score(table))
    category, which = words(table, "category")
    digits = digits_of(values)
    rows, quartiles = [], {}
    for r in found:
        inside = values[which == category.index(r.name)]
        inside = inside[np.isfinite(inside)]
        low, middle, high = np.quantile(inside, [0.25, 0.5, 0.75]) if inside.size else (np.nan,) * 3
        rows.append(
            [r.name or "(none)", f"{r.rows:,}", *(readable(v, digits) for v in (low, middle, high)), correlation(r.auc)]
        )
        if inside.size and len(quartiles) < 24:
            quartiles[r.name or "(none)"] = (float(low), float(middle), float(high))
    alt = f"Median and middle half of {label(leading)} in each category; the table beside holds the numbers."
    drawn = figure(
        "categories",
        f"{label(leading)} by category",
        svg.ranges(quartiles, x=label(leading)),
        alt,
        "Line: the middle half of the pairs; dot: the median.",
    )
    head = ["category", "pairs", "lower quartile", "median", "upper quartile", "AUC"]
    explained = (
        f"AUC: the chance that a pair of the category has a higher {label(by)} than a pair of another; 1 or 0 is full "
        "separation, 0.5 none."
    )
    table_html = data_table(head, rows)
    return gallery([drawn, f"<div>{paragraphs(explained)}{table_html}</div>"])


def _scores_section(table: Scores, leading: str) -> str:
    digits = {name: digits_of(score_column(table, name)) for name in tables.shown_scores(table)}
    rows = [[label(n), *(readable(v, digits.get(n, 0)) for v in vs)] for n, vs in tables.quantile_rows(table)]
    by_length = [
        [label(r.score), *map(correlation, (r.difference, r.total, r.difference_given_total, r.total_given_difference))]
        for r in tables.length_rows(table)
    ]
    agree = [[label(n), correlation(rho), correlation(partial)] for n, rho, partial in tables.agreement_rows(table)]
    lengths = {
        n.removesuffix("_tokens"): numbers(table, n)
        for n in ("chosen_tokens", "rejected_tokens")
        if n in table.schema.names
    }
    drawn = ""
    if lengths:
        medians = ", ".join(f"{n} {readable(float(np.median(v)), 0)}" for n, v in lengths.items())
        drawn = figure(
            "lengths",
            "Lengths of the responses",
            svg.two_histograms(lengths, x="tokens"),
            f"Distributions of the lengths of responses in tokens; medians: {medians}.",
            f"Medians: {medians} tokens.",
        )
    explained = (
        "Rank correlations with the lengths. A score that is mostly length says little that lengths do not. Columns "
        "with a bar are partial: the length after the bar is held fixed."
    )
    header = ["", "rejected − chosen", "total", "rejected − chosen | total", "total | rejected − chosen"]
    more = paragraphs(explained) + data_table(header, by_length)
    if agree:
        more += data_table(["with CHES", "rank correlation", "given both lengths"], agree)
    beside = data_table(["", *QUANTILES], rows) + _surface(table)
    return gallery([drawn, f"<div>{beside}</div>"]) + folded(
        "Rank correlations of the scores with the lengths and with CHES", more
    )


def _surface(table: Scores) -> str:
    """How many pairs differ little on the surface and look alike to the model."""
    if not {"ches", "edit_distance"} <= set(table.schema.names):
        return ""
    corner, near, high = tables.small_edit_high_ches(table)
    if not len(corner):
        return paragraphs("No pair has a small edit and a high CHES at once.")
    values = score_column(table, "ches")
    where = f"#min.ches={high:.6g}&amp;min.minus_edit_distance={-near:.6g}"
    bounds = f"edit distance up to {readable(near, 2)} and CHES from {readable(high, digits_of(values))} on"
    return (
        f"<p>{len(corner):,} pairs look alike on the surface and to the model: {bounds}. "
        f'<a href="{where}">Show them in the table</a>.</p>'
    )


def health(table: Scores, dropped: Mapping[str, int]) -> str:
    """What was wrong with rows, in numbers."""
    scored = tables.scored_rows(table)
    rows = [["in the table", len(table)], ["with a score", scored], ["without a score", len(table) - scored]]
    rows.append(["dropped before scoring", sum(dropped.values())])
    parts = [data_table(["rows", "number"], [[name, f"{n:,}"] for name, n in rows])]
    if dropped:
        parts.append(
            data_table(["dropped because of", "rows"], [[k, f"{n:,}"] for k, n in Counter(dropped).most_common()])
        )
    flags = tables.flag_counts(table)
    if not flags:
        return gallery([f"<div>{p}</div>" for p in parts]) + paragraphs("No row of the table has a flag.")
    parts.append(
        data_table(["flag", "meaning", "rows"], [[f, meaning, f"{n:,}"] for f, n, meaning in flags], text_columns=2)
    )
    return gallery([f"<div>{p}</div>" for p in parts])


def _reading(table: Scores) -> str:
    meanings = [[label(n), SCORES[n].meaning] for n in tables.shown_scores(table)]
    return paragraphs(*essays.SCORE_READING) + data_table(["score", "meaning"], meanings, text_columns=2)
