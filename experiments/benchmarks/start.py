"""What commands cost before they compute: CPU seconds of whole processes, in turn; writes ``results/start.json``.

    python -m experiments.benchmarks.start --model DIR --pairs FILE [--repeats 3] [--rows 1000 1000000]

Beside them stands what cannot be saved: the imports of the libraries that they are made of. *Cold* has an empty
compilation cache, *warm* the one that the cold run filled. ``select`` and ``report`` read made runs
of so many rows; they never compute. Python keeps its byte code, as that of an installed package is kept: a first turn,
which does not count, writes what is missing.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.data.sources import open_pairs
from ches_jax.scores.table import ROW_GROUP
from experiments.benchmarks.measure import keep, spent
from experiments.benchmarks.report_page import made_run

CHES = (sys.executable, "-m", "ches_jax")
IMPORTS = {
    "python, tyro and numpy": "import tyro, numpy",
    "jax and flax": "import jax, flax.nnx; jax.devices()",
    "jax, flax, pyarrow and tokenizers": "import jax, flax.nnx, pyarrow.parquet, tokenizers; jax.devices()",
    "torch and transformers": "from transformers import AutoModelForCausalLM, AutoTokenizer",
}


def made(folder: Path, rows: int) -> Path:
    """A finished score run of made pairs, with the file of pairs that it names."""
    pairs = folder / f"pairs-{rows}.jsonl"
    out = folder / f"run-{rows}"
    out.mkdir()
    with pairs.open("w", encoding="utf-8") as file:
        for record in made_run(out, rows):
            file.write(json.dumps(record.content) + "\n")
    table = pq.read_table(out / "scores.parquet")
    ids = pa.array([record.row_id for record in open_pairs(str(pairs))])
    table = table.set_column(table.schema.get_field_index("row_id"), table.schema.field("row_id"), ids)
    pq.write_table(table, out / "scores.parquet", row_group_size=ROW_GROUP)
    run = {"verb": "score", "model": "made", "config": {"pairs": str(pairs), "model": "made"}}
    (out / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return out


def commands(model: str, pairs: str, rows: Sequence[int], folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Every command by name, with what its environment adds."""
    cache = folder / "cache"
    score = [*CHES, "score", "--model", model, "--pairs", pairs, "--limit", "10", "--quiet", "--out"]
    by_name: dict[str, tuple[list[str], dict[str, str]]] = {
        **{f"import {name}": ([sys.executable, "-c", code], {}) for name, code in IMPORTS.items()},
        "ches --help": ([*CHES, "--help"], {}),
        "ches score --help": ([*CHES, "score", "--help"], {}),
        "score 10 pairs, cold": ([*score, str(folder / "cold")], {"CHES_COMPILATION_CACHE": str(cache)}),
        "score 10 pairs, warm": ([*score, str(folder / "warm")], {"CHES_COMPILATION_CACHE": str(cache)}),
    }
    for count in rows:
        out = made(folder, count)
        select = [*CHES, "select", "--scores", str(out), "--by", "head_score", "--keep", "lowest:0.5", "--quiet"]
        by_name[f"select of {count:,} rows"] = ([*select, "--out", str(folder / f"kept-{count}")], {})
        by_name[f"report of {count:,} rows"] = ([*CHES, "report", str(out)], {})
    return by_name


def main() -> None:
    """Measure, print a line for each command, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000])
    parser.add_argument("--name", default="start", help="of the file in results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        able = commands(args.model, args.pairs, args.rows, folder)
        runs: dict[str, list[dict[str, float]]] = {what: [] for what in able}
        for _ in range(1 + args.repeats):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for what, (command, env) in able.items():
                for out in ("cold", "warm", *(f"kept-{count}" for count in args.rows)):
                    shutil.rmtree(folder / out, ignore_errors=True)
                runs[what].append(spent(command, {"PYTHONDONTWRITEBYTECODE": "", **env})[1])
    result: dict[str, Any] = {}
    for what, (_, *each) in runs.items():
        cpu = [one["process_cpu_seconds"] for one in each]
        result[what] = {
            "cpu_seconds": statistics.median(cpu), "least": min(cpu), "most": max(cpu),
            "peak_rss_mb": max(one["peak_rss_mb"] for one in each),
        }  # fmt: skip
        print(f"{what:40} {result[what]['cpu_seconds']:8.2f} CPU s  {result[what]['peak_rss_mb']:8.0f} MB")
    keep(args.name, {"repeats": args.repeats, "commands": result})


if __name__ == "__main__":
    main()
