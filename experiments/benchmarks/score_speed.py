"""Scoring speed beside PyTorch, interleaved: the official way and a strong batched baseline; the head score's cost.

    python -m experiments.benchmarks.score_speed --peers DIR --tokenizer DIR --data PAIRS.jsonl [--pairs 128]

``--peers`` holds ``torch_score.py`` (``--how official|batched``) and ``make_model.py``, which writes the random
30M-class Llama that all score. Seconds are those of the scoring loop, tokenised rows in, numbers out; the second table
(``--many`` pairs) counts compilation in. The checksum of CHES must agree.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import interleaved, keep, medians

SCORING = [sys.executable, "-m", "experiments.benchmarks.scoring"]


def benchmark_model(peers: Path, tokenizer: Path) -> str:
    """The random Llama of 39.6M parameters (23M of them in its layers)."""
    model = Path(tempfile.gettempdir()) / "ches_jax_benchmark_30m"
    if not model.exists():
        words = [sys.executable, str(peers / "make_model.py"), str(model), "--tokenizer", str(tokenizer)]
        subprocess.run(words, check=True, capture_output=True)
    return str(model)


def agree(table: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Refuse to compare ways that did not compute the same thing."""
    sums = {name: row["ches_sum"] for name, row in table.items()}
    if max(sums.values()) - min(sums.values()) > tolerance * max(map(abs, sums.values())):
        raise SystemExit(f"the checksums of CHES differ: {sums}")


def without_compilation(commands: dict[str, list[str]], repeats: int) -> dict[str, Any]:
    """Every way ``repeats`` times in turn; costs over ours, and ours over the matmul peak."""
    runs = interleaved(commands, repeats)
    table = {name: medians(timings) for name, timings in runs.items()}
    agree(table)
    units = ("cpu_seconds", "seconds")
    ratios = {f"{n} / ours, {u}": table[n][u] / table["ours"][u] for n in table if n != "ours" for u in units}
    own = table["ours"]
    ratios["useful matmul FLOP/s over peak"] = own["matmul_gflops"] / own["matmul_peak_gflops"]
    ratios["padding, share of positions"] = 1 - own["used_positions"] / own["positions"]
    return {"table": table, "ratios": ratios, "runs": runs}


def with_compilation(ours: list[str], official: list[str]) -> dict[str, Any]:
    """Many pairs once, ours from the first compilation on."""
    runs = interleaved({"ours": ours, "torch official": official}, 1)
    own, theirs = runs["ours"][0], runs["torch official"][0]
    agree({"ours": own, "torch official": theirs})
    ratios = {f"torch official / ours, {u}": theirs[u] / own[f"with_compile_{u}"] for u in ("cpu_seconds", "seconds")}
    return {"ratios": ratios, "runs": runs}


def show(title: str, result: dict[str, Any]) -> None:
    """Print a table and its ratios."""
    print(title)
    for name, row in result.get("table", {}).items():
        print(f"  {name:<16}{row['cpu_seconds']:8.2f} CPU s{row['seconds']:8.2f} s   checksum {row['ches_sum']:.6g}")
    for name, value in result["ratios"].items():
        print(f"  {name:<40}{value:6.2f}")


def main() -> None:
    """Interleave the ways and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--many", type=int, default=512, help="pairs of the table that counts compilation; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    peers, data = args.peers.resolve(), str(args.data.resolve())
    model = benchmark_model(peers, args.tokenizer.resolve())
    torch = [sys.executable, str(peers / "torch_score.py"), model, data, "--threads", "2"]
    some = ["--pairs", str(args.pairs)]
    ways = {
        "ours": [*SCORING, model, data, *some],
        "ours with head score": [*SCORING, model, data, *some, "--head"],
        "torch batched": [*torch, "--how", "batched", *some],
        "torch official": [*torch, "--how", "official", *some, "--repeat", "1"],
    }
    result: dict[str, Any] = {"pairs": args.pairs, **without_compilation(ways, args.repeats)}
    show(f"{args.pairs} pairs, without compilation", result)
    if args.many:
        many = ["--pairs", str(args.many)]
        official = [*torch, "--how", "official", *many, "--repeat", "1"]
        included = with_compilation([*SCORING, model, data, *many, "--repeat", "0"], official)
        show(f"{args.many} pairs, compilation included", included)
        result["compilation_included"] = {"pairs": args.many, **included}
    print(keep("score_speed_cpu", result))


if __name__ == "__main__":
    main()
