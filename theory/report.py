"""``ches report`` for a directory of ``ches verify``: one self-contained page, and its figures as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ches_jax.errors import RunError
from ches_jax.report.html import data_table, gallery, page, paragraphs, picture
from ches_jax.report.sections import flat
from ches_jax.runs.files import read_object, replacing
from theory.figures import pictures

CLAIMS, FIGURES = "claims.json", "figures.json"
STATUSES = ("exact", "bound", "statistical", "refuted as printed")
READING = (
    "Each claim is a statement about likelihood displacement with a check. Exact: two numbers are one, the value is "
    "the largest error. Bound: something never happens, the value is the worst violation met by random draws and by a "
    "search (negative: the distance kept). Statistical: an average, a slope or a correlation. Refuted as printed: the "
    "printed text is wrong by the value, which has to be at least the tolerance.",
)


def report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Writes ``report.html`` and ``figures/*.png`` from what ``ches verify --out`` wrote.

    Args:
      run_dir: a directory with ``claims.json`` and, for figures, ``figures.json``.
      out: where to write; the directory itself when not given. Reports are written over.

    Raises:
      RunError: the directory holds no results of ``ches verify``.
    """
    run_dir = Path(run_dir)
    out = run_dir if out is None else Path(out)
    results = read_object(run_dir / CLAIMS, RunError, "a directory of ches verify --out")
    claims = results.get("claims")
    if not isinstance(claims, list) or not claims:
        raise RunError(f"{run_dir / CLAIMS}: holds no claims; there is nothing to report")
    there = (run_dir / FIGURES).exists()
    data = read_object(run_dir / FIGURES, RunError, "a directory of ches verify --out") if there else {}
    drawn = []
    for claim, figure in pictures(data):
        with replacing(out / "figures" / f"{figure.name}.png") as temporary:
            temporary.write_bytes(figure.png)
        drawn.append((figure.name, picture(figure.png, figure.alt, f"{figure.caption} [{claim}]")))
    body = [
        ("reading", "How to read this", paragraphs(*READING)),
        *((s.replace(" ", "-"), s.capitalize(), _table([c for c in claims if c["status"] == s])) for s in STATUSES),
        ("toy", "Toy models", gallery([html for name, html in drawn if name.startswith("toy")])),
        ("model", "The model and its pairs", gallery([html for name, html in drawn if name.startswith("model")])),
        ("detail", "What each claim saw", _details(claims)),
        ("provenance", "Provenance", data_table(["what", "value"], _provenance(results), text_columns=2)),
    ]
    failed = [c["id"] for c in claims if not c["passed"]]
    lead = f"{len(claims) - len(failed)} of {len(claims)} claims hold" + (
        f"; not: {', '.join(failed)}" if failed else ""
    )
    text = page("Claims of the theory", paragraphs(lead + "."), [part for part in body if part[2]])
    with replacing(out / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return out / "report.html"


def _table(claims: Sequence[dict[str, Any]]) -> str:
    if not claims:
        return ""
    rows = [
        [c["id"], c["statement"], c["source"], "holds" if c["passed"] else "FAILS", f"{c['value']:.2e}",
         f"{c['tolerance']:.0e}", c["n"], f"{c['seconds']:.1f}"]
        for c in claims
    ]  # fmt: skip
    header = ["id", "statement", "source", "", "value", "tolerance", "n", "s"]
    return data_table(header, rows, text_columns=4)


def _details(claims: Sequence[dict[str, Any]]) -> str:
    rows = [[c["id"], *row] for c in claims for row in flat(c["detail"])]
    return data_table(["claim", "what", "value"], rows, text_columns=3) if rows else ""


def _provenance(results: dict[str, Any]) -> list[tuple[str, str]]:
    return flat({name: value for name, value in results.items() if name != "claims"})
