"""Write the table of ``experiments/README.md``, the tables in the paper's layout and the figures.

python -m experiments.report            from the committed results alone; nothing is computed anew
python -m experiments.report --check    writes nothing; exit code 1 when README.md does not say what the results say
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ches_jax.errors import ChesError, RunError
from ches_jax.runs.files import read_object
from experiments.framework.item import ITEMS, ROOT, ReportLine, cell, load, result_file

README = ROOT / "experiments" / "README.md"
BEGIN, END = "<!-- report: begin (python -m experiments.report) -->", "<!-- report: end -->"
HEAD = ("paper item", "command", "hardware and time", "paper", "ours (mean, 95% interval over seeds)", "verdict")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What to do."""

    check: bool = False
    """Only compare README.md and the tables with the results."""


def results(root: Path = ROOT) -> list[tuple[str, dict[str, Any]]]:
    """Committed results with their names, by item and name.

    Raises:
      RunError: a file that is not a result of ``experiments.run``.
    """
    named = []
    for item in ITEMS:
        for path in sorted((root / "experiments" / item / "results").glob("*.json"), key=lambda p: p.stem):
            result = read_object(path, RunError, "a result of experiments.run")
            missing = [k for k in ("item", "scale", "config", "seeds", "device", "result") if k not in result]
            if missing or result["item"] != item:
                raise RunError(f"{path}: not a result of {item} ({', '.join(missing) or result['item']})")
            named.append((path.stem, result))
    return named


def section(named: Sequence[tuple[str, dict[str, Any]]], written: Sequence[Path] = ()) -> str:
    """The generated part of README.md."""
    parts = []
    for item in ITEMS:
        of_item = [(name, result) for name, result in named if result["item"] == item]
        if not of_item:
            continue
        module = load(item)
        parts.append(f"### {module.TITLE}\n")
        if note := getattr(module, "NOTE", ""):
            parts.append(f"{note}\n")
        for name, result in of_item:
            parts.append(table(name, result, module.rows(result)))
            parts += [
                f"![{p.stem}]({p.relative_to(README.parent).as_posix()})"
                for p in written
                if p.parent.parent.name == item and drawn_from(p, [n for n, _ in of_item]) == name
            ]
            parts.append("")
    return "\n".join(parts)


def drawn_from(picture: Path, names: Sequence[str]) -> str | None:
    """The result that a figure belongs to, by its name.

    >>> drawn_from(Path("small-tuned-scores.png"), ["small", "small-tuned", "tiny"])
    'small-tuned'
    """
    return max((n for n in names if picture.name.startswith(f"{n}-")), key=len, default=None)


def table(name: str, result: dict[str, Any], rows: Sequence[ReportLine]) -> str:
    """One result as a table."""
    details = f"{result['item']}/results/{name}"
    about = f"**{name}**: {len(result['seeds'])} seeds, commit {result['commit']}, [all numbers]({details}.json)"
    if (README.parent / f"{details}.md").exists():
        about += f", [tables]({details}.md)"
    lines = [about, "", _line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line([r.paper_item, f"`{r.command}`", *r[2:]]) for r in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(cell, cells)) + " |"


def replaced(text: str, part: str) -> str:
    """README.md with its generated part exchanged.

    Raises:
      RunError: the marks are not there.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise RunError(f"{README}: expected the lines {BEGIN!r} and {END!r}, once each")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{part}\n{END}{after}"


def texts(named: Sequence[tuple[str, dict[str, Any]]]) -> dict[Path, str]:
    """Tables in the paper's layout, by the file that they belong in."""
    return {
        result_file(result["item"], name).with_suffix(".md"): load(result["item"]).tables(result)
        for name, result in named
    }


def pictures(named: Sequence[tuple[str, dict[str, Any]]]) -> list[Path]:
    """Draws the figures beside the results."""
    return [
        path
        for name, result in named
        for path in load(result["item"]).figures(result, name, result_file(result["item"], name).parent)
    ]


def report(options: Report) -> int:
    """Write, or compare; returns the exit code."""
    named = results()
    if not named:
        raise RunError("no results yet; python -m experiments.run ITEM --scale tiny --out DIR --record tiny makes one")
    old = README.read_text(encoding="utf-8")
    if options.check:
        drawn = sorted(p for item in ITEMS for p in (ROOT / "experiments" / item / "results").glob("*.png"))
        new = {README: replaced(old, section(named, drawn)), **texts(named)}
        stale = [p for p, text in new.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path} differs: run python -m experiments.report")
        if not stale:
            print("README.md and the tables say what the results say")
        return int(bool(stale))
    for path, text in texts(named).items():
        path.write_text(text, encoding="utf-8")
    drawn = sorted(pictures(named))
    README.write_text(replaced(old, section(named, drawn)), encoding="utf-8")
    print(README)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    try:
        return report(tyro.cli(Report, args=argv, prog="experiments.report", description=__doc__))
    except (ChesError, json.JSONDecodeError) as e:
        print(f"experiments.report: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
