"""The page of a directory of ``ches groups``: what an update would do to every response, which winners would fall."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.data.messages import side_text
from ches_jax.data.rollouts import ROLLOUTS, read_groups
from ches_jax.data.sources import open_rows
from ches_jax.errors import ChesError, RunError
from ches_jax.report import elements, svg
from ches_jax.report.axes import readable
from ches_jax.report.document import Page, Section
from ches_jax.report.html import data_table, escape, figure, gallery, paragraphs
from ches_jax.report.pair_table import Column, PairTable
from ches_jax.report.provenance import model_name, provenance, read_record, short_path
from ches_jax.runs.files import read_parquet

SETS = {"winners": "winner", "losers": "loser", "others": "neither"}
"""By the sign of the advantage."""
LABELS = {
    "rate": "rate by its own group",
    "rate_own": "own part",
    "rate_winners": "by other winners",
    "rate_losers": "by other losers",
    "head_rate": "rate through the unembedding alone",
    "nthr": "negative token hidden reward",
}
LIMITS = (
    "Rates are derivatives along the update of the group alone, in the gradient's own metric; the forecast is nats by "
    "the updates of all groups in the optimiser's metric, first order.",
    "The updates are those of the policy gradient where the responses were sampled: no clipping, no KL term, no second "
    "pass over the same rollouts. No reinforcement-learning run was compared with them here.",
)


def groups_page(run_dir: Path) -> Page:
    """The page of a directory of ``ches groups``.

    Raises:
      RunError: its table cannot be read, or has no rows.
    """
    table = read_parquet(run_dir / "groups.parquet", RunError, "a table of ches groups")
    if not len(table):
        raise RunError(f"{run_dir / 'groups.parquet'}: has no rows; there is nothing to report")
    record = read_record(run_dir)
    summary: Mapping[str, Any] = record.get("summary") or {}
    sign = np.sign(table["coefficient"].to_numpy()).astype(int)
    words = np.array([SETS["losers"], SETS["others"], SETS["winners"]], dtype=object)[sign + 1]
    falls = table["falls"].to_numpy(zero_copy_only=False)
    winners, falling = int((sign > 0).sum()), int(falls.sum())
    responses = _responses(run_dir, table, words, record.get("config") or {})
    forecast = table["forecast"].to_numpy()
    sides = [SETS[name] for name in ("winners", "losers") if (words == SETS[name]).any()]
    spread = {f"{name}s": forecast[words == name] for name in sides}
    figures = [
        figure(
            "forecasts",
            "Forecast change of ln π(response)",
            svg.two_histograms(spread, x="forecast, nats", of="responses"),
            f"How the forecast changes of {' and '.join(spread)} are spread.",
            "By the updates of all groups. A winner left of 0 would fall although it won.",
        ),
        elements.scatter(
            "own_and_others",
            "By itself and by the losers",
            responses,
            "rate_losers",
            "rate_own",
            by="set",
            choose=True,
        ),
    ]
    everything = elements.table_body("Every response, one row each; a click or Enter on the arrow unfolds it.")
    leading = [int(p) for p in responses.leading_rows()[:3] if falls[int(p)]]
    which = ", ".join(elements.row_link(responses, p) for p in leading)
    return Page(
        kind="ches groups",
        title=f"Groups: {run_dir.name}",
        headline=f"{falling:,} of {winners:,} winners would fall by the update of their own group",
        subtitle=elements.subtitle(
            model_name(record), short_path((record.get("config") or {}).get("groups")), _run(summary)
        ),
        tone="bad" if falling else "good",
        answers=[
            ("Which winners?", f"Those with the lowest rate: {which}." if which else "None."),
            ("Why?", escape(_why(table, falls))),
            ("And by all groups together?", escape(_by_all(summary, winners))),
        ],
        notes=[],
        sections=[
            Section(anchor="groups", heading="What would move", body=gallery(figures) + _set_table(summary)),
            Section(anchor="responses", heading="All responses", body=everything),
            Section(anchor="limits", heading="What this does not show", body=paragraphs(*LIMITS), folded=True),
            provenance(record),
        ],
        pairs=responses,
    )


def _run(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    return f"{summary['objective']}, {summary['optimizer']} at {summary['lr']:g}, {summary['groups']:,} groups"


def _why(table: pa.Table, falls: np.ndarray) -> str:
    """What pulls the falling winners down, in the mean."""
    if not falls.any():
        return "No winner falls: what it gains by its own part is more than the others take."
    own, winners, losers = (
        float(table[n].to_numpy()[falls].mean()) for n in ("rate_own", "rate_winners", "rate_losers")
    )
    worst = "losers" if losers < winners else "other winners"
    return (
        f"In the mean of the winners that fall, their own part is {readable(own, 2, signed=True)}, other winners add "
        f"{readable(winners, 2, signed=True)} and losers {readable(losers, 2, signed=True)}: the {worst} take most. "
        "Losers that share tokens with a winner pull it down with them."
    )


def _by_all(summary: Mapping[str, Any], winners: int) -> str:
    fall = summary.get("winners_forecast_to_fall")
    return "Not known." if fall is None else f"{fall:,} of {winners:,} winners are forecast to fall."


def _set_table(summary: Mapping[str, Any]) -> str:
    """Means of winners and of losers."""
    names = ("forecast", "rate", "rate_own", "rate_winners", "rate_losers", "head_rate")
    rows = [
        [name, f"{one['responses']:,}", *(readable(one[n], 2, signed=True) for n in names)]
        for name, one in (summary.get("sets") or {}).items()
    ]
    head = ["responses", "count", "forecast, nats", *(LABELS[n] for n in names[1:])]
    return data_table(head, rows, caption="Means") if rows else ""


def _responses(run_dir: Path, table: pa.Table, words: np.ndarray, config: Mapping[str, Any]) -> PairTable:
    def numbers(name: str) -> np.ndarray:
        return table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)

    columns = [
        Column(
            name="group",
            label="group",
            values=table["group"].to_numpy(),
            down=False,
            meaning="in the order of the data",
        ),
        Column(name="response", label="response", values=table["response"].to_numpy(), down=False, meaning="from 0"),
        Column(name="set", label="advantage", values=list(words), kind="word"),
        elements.number_column("forecast", "forecast", numbers("forecast"), down=False),
    ]
    for name, label in LABELS.items():
        if table[name].null_count < len(table):
            shown = name in ("rate", "rate_own", "rate_losers")
            columns.append(
                Column(name=name, label=label, values=numbers(name), signed=True, minor=name != "rate", shown=shown)
            )
    for name, label in (("reward", "reward"), ("advantage", "advantage, number")):
        if table[name].null_count < len(table):
            columns.append(Column(name=name, label=label, values=numbers(name), minor=True, shown=name != "advantage"))
    columns.append(Column(name="tokens", label="tokens", values=table["tokens"].to_numpy(), minor=True))
    # Winners first, the lowest rate first: those that fall although they won lead the table.
    rank = np.where(words == SETS["winners"], numbers("rate"), np.inf)
    columns.append(
        Column(name="lead", label="rate of winners", values=np.where(np.isinf(rank), np.nan, rank), shown=False)
    )
    return PairTable(
        name=f"{run_dir.name}_responses",
        rows=len(table),
        columns=columns,
        key=["group", "response"],
        sort=("lead", 1),
        texts=_texts(table["row_id"].to_pylist(), config),
        row_ids=table["row_id"].to_pylist(),
        one="response",
        unit="responses",
    )


def _texts(rows: Sequence[str], config: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Prompts and responses, as far as the file can still be read."""
    try:
        source = open_rows(str(config["groups"]), config.get("split"), config.get("columns"), ROLLOUTS)
        records = [r.record for group in read_groups(source) for r in group.rollouts]
    except (ChesError, OSError, KeyError):
        return {}
    found = {r.row_id: r.content for r in records}
    texts: dict[str, Sequence[str]] = {}
    for side, name in (("prompt", "prompt"), ("response", "chosen")):
        texts[side] = [side_text(found[row], name) if row in found else "" for row in rows]
    return texts if any(texts["response"]) else {}
