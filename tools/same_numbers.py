"""Do two versions of the code give the same numbers? Record each, then compare.

A restructuring must not move a number. Record in a checkout of either version, with the same interpreter and machine:

    python tools/same_numbers.py record --checkout OLD --model DIR --pairs FILE --out OLD_NUMBERS
    python tools/same_numbers.py record --checkout NEW --model DIR --pairs FILE --out NEW_NUMBERS
    python tools/same_numbers.py compare OLD_NUMBERS NEW_NUMBERS

``record`` runs the commands of ``COMMANDS`` with each checkout's own code: score tables with token scores and
log-probabilities, ten updates of DPO, IPO and LoRA, a diagnosis, greedy texts and every claim of the theory, on the
bundled model and (with ``--model`` and ``--pairs``) on another one. ``compare`` prints one line for each file: equal
to the bit, or the largest difference; its exit code is 1 where a difference is beyond rounding or anything is missing.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

TRAIN = (
    "train --limit 60 --holdout 12 --steps 10 --batch-size 4 --lr 1e-5 --eval-every 5 --mesh data=1 --on-bad-row drop"
)
COMMANDS = {
    "scores": "score --by head_score --token-scores --logps --on-bad-row drop --limit 96",
    "ches": "score --on-bad-row drop --limit 96",
    "dpo": f"{TRAIN} --loss dpo",
    "ipo": f"{TRAIN} --loss ipo_mean",
    "lora": f"{TRAIN} --loss dpo --lora-rank 4",
    "texts": "generate --temperature 0 --limit 16 --max-new-tokens 24 --on-bad-row drop",
    "diagnosis": "diagnose {out}/dpo --json",
    "claims": "verify --instances 100",
}
TABLES = ["scores.parquet", "token_scores.parquet", "displacement.parquet", "reference.parquet"]
NAMES = {"seconds", "source", "seconds_per_update", "tokens_per_second", "updates_this_time", "time"}
"""Numbers that two runs of one version do not share."""
RENAMED = {"both_down_margin_up": "displaced"}
"""Words of 0.1 for what has another name now."""
OTHER_RULE = {("diagnosis.json", "/verdict")}
"""Words that follow another rule since 0.1: they are printed beside each other, and may differ. The verdict on a run
was `undecided` where the chosen responses had not fallen but nothing else was clear; now it is `not_displaced`."""
ROUNDING = 1e-6
"""Relative: float32 sums in another order."""


def record(checkout: Path, out: Path, options: list[str]) -> None:
    """Run every command of one checkout; what has been recorded before is kept."""
    out.mkdir(parents=True, exist_ok=True)
    for name, command in COMMANDS.items():
        path = out / name
        if path.with_suffix(".done").exists():
            continue
        words = command.format(out=out).split()
        arguments = [] if words[0] == "diagnose" else ["--out", str(path)]
        if words[0] in ("score", "train"):
            arguments += options
        if words[0] == "generate" and options:
            arguments += [options[0], options[1], "--prompts", options[3]]
        if words[0] == "verify" and options:
            arguments += [*options, "--claims", "K0m", "F6", "--limit", "8"]
        print(f"{name}: ches {' '.join([*words, *arguments])}", file=sys.stderr, flush=True)
        environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(
            [sys.executable, "-m", "ches_jax", *words, *arguments],
            capture_output=True,
            text=True,
            cwd=checkout,
            env=environment,
        )
        if run.returncode not in (0, 1):
            raise SystemExit(f"{name} failed:\n{run.stderr}")
        if words[0] == "diagnose":
            path.mkdir(exist_ok=True)
            (path / "diagnosis.json").write_text(run.stdout)
        path.with_suffix(".done").touch()


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and word of nested data, by its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in NAMES:
                yield from leaves(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{name}/{i}")
    else:
        yield name, RENAMED.get(value, value) if isinstance(value, str) else value


def contents(path: Path) -> dict[str, Any]:
    """A file as a flat mapping from names to numbers and words."""
    if path.suffix == ".parquet":
        return dict(leaves(pq.read_table(path).to_pydict()))
    if path.suffix == ".jsonl":
        return dict(leaves([json.loads(line) for line in path.read_text().splitlines()]))
    if path.suffix == ".safetensors":
        import ml_dtypes  # noqa: F401  (NumPy learns bfloat16 by it)
        from safetensors.numpy import load_file

        return dict(load_file(path))
    return dict(leaves(json.loads(path.read_text())))


def difference(old: Any, new: Any) -> float:
    """Relative difference of two numbers; infinite where they are not comparable."""
    if isinstance(old, bool | str | None) or isinstance(new, str | None):
        return 0.0 if old == new else math.inf
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    if old.shape != new.shape or not np.array_equal(np.isnan(old), np.isnan(new)):
        return math.inf
    scale = np.maximum(np.maximum(np.abs(old), np.abs(new)), 1.0)
    return float(np.nanmax(np.abs(old - new) / scale, initial=0.0))


def compare(old: Path, new: Path) -> int:
    """Print a line for each file of results."""
    wanted = [
        p
        for pattern in ("*.parquet", "*.jsonl", "*.safetensors", "diagnosis.json", "claims.json")
        for p in old.rglob(pattern)
        if "checkpoints" not in p.parts and "parts" not in p.parts
    ]
    bad = 0
    for path in sorted(wanted):
        name = path.relative_to(old)
        other = new / name
        if not other.exists():
            print(f"{name}: MISSING")
            bad += 1
            continue
        a, b = contents(path), contents(other)
        gone = sorted(a.keys() - b.keys())
        decided = [key for file, key in OTHER_RULE if file == path.name and a.get(key) != b.get(key)]
        differences = {key: difference(a[key], b[key]) for key in a.keys() & b.keys() if key not in decided}
        key = max(differences, key=differences.__getitem__, default="")
        worst = differences.get(key, 0.0)
        verdict = "equal" if worst == 0 else f"largest difference {worst:.1e} at {key} ({a[key]!r:.40} {b[key]!r:.40})"
        if gone:
            verdict += f"; {len(gone)} gone, such as {gone[0]}"
        verdict += "".join(f"; {key} by another rule: {a[key]} then, {b.get(key)} now" for key in decided)
        wrong = worst > ROUNDING or bool(gone)
        bad += wrong
        print(f"{name}: {'DIFFERS, ' if wrong else ''}{verdict}; {len(differences)} values")
    print(f"{len(wanted) - bad} of {len(wanted)} files agree")
    return int(bad > 0)


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="run the commands of one checkout")
    recorder.add_argument("--checkout", type=Path, required=True)
    recorder.add_argument("--out", type=Path, required=True)
    recorder.add_argument("--model", help="record on this model too")
    recorder.add_argument("--pairs", help="preference pairs for --model")
    comparer = commands.add_parser("compare", help="compare two records")
    comparer.add_argument("old", type=Path)
    comparer.add_argument("new", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "compare":
        return compare(arguments.old, arguments.new)
    record(arguments.checkout.resolve(), arguments.out.resolve() / "bundled", [])
    if arguments.model and arguments.pairs:
        options = ["--model", str(Path(arguments.model).resolve()), "--pairs", str(Path(arguments.pairs).resolve())]
        record(arguments.checkout.resolve(), arguments.out.resolve() / "model", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
