"""``ches report`` for a directory of ``ches verify``: one self-contained page, and its figures as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ches_jax.errors import RunError
from ches_jax.report.document import Page, Section
from ches_jax.report.elements import subtitle
from ches_jax.report.html import data_table, gallery, paragraphs, picture
from ches_jax.report.page import write_page
from ches_jax.report.provenance import flat, provenance
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
    """Writes ``report.html`` and ``figures/*.svg`` from what ``ches verify --out`` wrote.

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
        with replacing(out / "figures" / f"{figure.name}.svg") as temporary:
            temporary.write_bytes(figure.svg)
        drawn.append((figure.name, picture(figure.svg, figure.alt, f"{figure.caption} [{claim}]", name=figure.name)))
    failed = [c["id"] for c in claims if not c["passed"]]
    held = f"{len(claims) - len(failed)} of {len(claims)} claims hold"
    body = [
        *(
            Section(
                anchor=s.replace(" ", "-"), heading=s.capitalize(), body=_table([c for c in claims if c["status"] == s])
            )
            for s in STATUSES
        ),
        Section(
            anchor="toy", heading="Toy models", body=gallery([html for name, html in drawn if name.startswith("toy")])
        ),
        Section(
            anchor="model",
            heading="The model and its pairs",
            body=gallery([html for name, html in drawn if name.startswith("model")]),
        ),
        Section(anchor="reading", heading="How to read this", body=paragraphs(*READING), folded=True),
        Section(anchor="detail", heading="What each claim saw", body=_details(claims), folded=True),
        provenance({name: value for name, value in results.items() if name != "claims"}),
    ]
    counts = ", ".join(
        f"{sum(c['status'] == s for c in claims)} {s}" for s in STATUSES if any(c["status"] == s for c in claims)
    )
    page = Page(
        kind="ches verify",
        title=held,
        headline=held + (f"; not: {', '.join(failed)}" if failed else ""),
        subtitle=subtitle(counts, str(run_dir)),
        answers=[
            ("Does the theory hold?", f"{held}." if not failed else f"{held}; those that do not are marked FAILS.")
        ],
        tone="bad" if failed else "good",
        sections=[s for s in body if s.body],
    )
    return write_page(page, out)


def _table(claims: Sequence[dict[str, Any]]) -> str:
    if not claims:
        return ""
    rows = [
        [
            c["id"],
            c["statement"],
            c["source"],
            "holds" if c["passed"] else "FAILS",
            f"{c['value']:.2e}",
            f"{c['tolerance']:.0e}",
            c["n"],
            f"{c['seconds']:.1f}",
        ]
        for c in claims
    ]
    header = ["id", "statement", "source", "verdict", "value", "tolerance", "n", "s"]
    return data_table(header, rows, text_columns=4)


def _details(claims: Sequence[dict[str, Any]]) -> str:
    rows = [[c["id"], *row] for c in claims for row in flat(c["detail"])]
    return data_table(["claim", "what", "value"], rows, text_columns=3) if rows else ""
