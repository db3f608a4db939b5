"""CPU seconds and peak memory of ``ches select``, ``report``, ``show`` as rows grow; writes ``results/many_rows.json``.

    python -m experiments.benchmarks.many_rows [--rows 1000 10000 100000 1000000 --repeats 1]

The runs are made (heavy-tailed scores, texts of natural lengths): no verb computes. Each command is a process of
its own; what others used of the machine is recorded with it. The goal of a million rows is 15 CPU seconds, and memory
that does not grow with the rows.
"""

import argparse
import multiprocessing
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import busy, keep, machine, medians, spent
from experiments.benchmarks.start import CHES, made


def commands(run: Path, out: Path) -> dict[str, list[str]]:
    """The verbs on one run."""
    select = ["select", "--scores", str(run), "--by", "head_score", "--keep", "lowest:0.5", "--quiet"]
    return {
        "select": [*CHES, *select, "--out", str(out)],
        "report": [*CHES, "report", str(run)],
        "show": [*CHES, "show", str(run), "777"],
    }


def made_apart(folder: Path, rows: int) -> Path:
    """``made`` in a process of its own: the peak memory of a command is at least that of the process that starts it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        return other.submit(made, folder, rows).result()


def measured(command: Sequence[str], out: Path) -> dict[str, float]:
    """What one process spent, with what else the machine did; ``out`` is removed first."""
    shutil.rmtree(out, ignore_errors=True)
    before = machine()
    used = spent(command)[1]
    return used | busy(before, machine(), used["process_cpu_seconds"])


def growth(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Peak memory at the most rows over that at the fewest, by verb.

    >>> growth({"10": {"select": {"peak_rss_mb": 100.0}}, "1000": {"select": {"peak_rss_mb": 150.0}}})
    {'select': 1.5}
    """
    fewest, most = (str(how(int(n) for n in table)) for how in (min, max))
    return {
        verb: round(table[most][verb]["peak_rss_mb"] / row["peak_rss_mb"], 3) for verb, row in table[fewest].items()
    }


def main() -> None:
    """Measure every verb at every number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    table: dict[str, dict[str, Any]] = {}
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as name:  # a million rows take gigabytes: one run at a time
            folder = Path(name)
            run, out = made_apart(folder, rows), folder / "kept"
            verbs = commands(run, out)
            turns = [{verb: measured(words, out) for verb, words in verbs.items()} for _ in range(args.repeats)]
        table[str(rows)] = {verb: medians([turn[verb] for turn in turns]) for verb in verbs}
        for verb, row in table[str(rows)].items():
            print(
                f"{verb} of {rows:>9,} rows {row['process_cpu_seconds']:8.2f} CPU s {row['process_seconds']:8.2f} s"
                f"{row['peak_rss_mb']:8.0f} MB   others {row['others']:.2f}, steal {row['steal']:.2f}",
                flush=True,
            )
    print(keep("many_rows", {"repeats": args.repeats, "table": table, "memory_growth": growth(table)}))


if __name__ == "__main__":
    main()
