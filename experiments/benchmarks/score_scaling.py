"""How the cost of scoring grows with length, models, pairs, devices and processes, and the share of the matmul peak.

    python -m experiments.benchmarks.score_scaling --model DIR --tokenizer DIR [--curves length size pairs devices
        processes --lengths 128 ... --sizes 1m ... --counts 1000 ... --devices 1 2 --processes 1 2 4 --repeats 1]

All pairs are random tokens, three quarters of them prompt. Lengths are those of prompt + response, at a constant number
of positions; models are random Llamas; devices are virtual ones on a CPU, which share its cores. The curves of pairs
and of processes are of whole ``ches score`` commands (``score_run``), with their start, with the smallest model and 48
tokens a pair, so that what the host does shows. Results are written after each curve, beside those that are there, with
a page of the curves (``results/score_scaling.html``).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.measure import RESULTS, environment, interleaved, keep, medians
from experiments.benchmarks.score_scaling_page import write_page
from experiments.benchmarks.side_by_side import write_model

TOKENS = 40_960
"""Positions of every point of the curve of lengths."""
POSITIONS = {"1m": 40_960, "3m": 40_960, "30m": 20_480, "120m": 10_240, "1b": 2_560}
"""Positions of every point of the curve of models, whose pairs have 320 tokens."""


CURVES = {
    "length": "prompt + response, tokens",
    "size": "models, pairs of 192 + 64 + 64 tokens",
    "devices": "devices, 128 pairs of 192 + 64 + 64 tokens",
    "pairs": "whole commands, pairs of 36 + 12 + 12 tokens",
    "processes": "whole commands of 20,000 pairs of 36 + 12 + 12 tokens, by processes",
}


def write_pairs(path: Path, count: int, length: int, seed: int = 0) -> Path:
    """Rows of token ids: prompt of 3/4 ``length``, two responses of 1/4."""
    rng = np.random.default_rng(seed)
    sizes = {"prompt_ids": length * 3 // 4, "chosen_ids": length // 4, "rejected_ids": length // 4}
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            out.write(json.dumps({name: rng.integers(100, 1000, n).tolist() for name, n in sizes.items()}) + "\n")
    return path


def curve(title: str, commands: dict[str, list[str]], repeats: int) -> dict[str, Any]:
    """Run the points of one curve in turn and print it."""
    runs = interleaved(commands, repeats)
    table = {point: medians(timings) for point, timings in runs.items()}
    print(title)
    for point, row in table.items():
        seconds = f"{row['pairs'] / row['seconds']:10.1f} pairs/s{row['cpu_seconds']:9.2f} CPU s"
        if "matmul_gflops" in row:
            row["share_of_matmul_peak"] = round(row["matmul_gflops"] / row["matmul_peak_gflops"], 3)
            row["positions_per_second"] = round(row["used_positions"] / row["seconds"], 1)
            print(f"  {point:>8}{seconds}   {row['share_of_matmul_peak']:.2f} of the matmul peak")
        else:
            print(f"  {point:>8}{seconds}   {row['largest_process_mb']:.0f} MB")
    return table


def main() -> None:
    """The curves that were named, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="of the curves of length and devices")
    parser.add_argument("--tokenizer", type=Path, required=True, help="for the models that are made")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024, 4096, 16384])
    parser.add_argument("--sizes", nargs="*", choices=POSITIONS, default=["1m", "3m", "30m", "120m", "1b"])
    parser.add_argument("--counts", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    file = RESULTS / "score_scaling.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    table = before.get("table", {}) if before.get("environment") == environment() else {}
    for name in args.curves:
        with tempfile.TemporaryDirectory() as folder:
            table[name] = curve(CURVES[name], points(name, args, Path(folder)), args.repeats)
        path = keep("score_scaling", {"table": table})
        print(path, write_page(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".html")))


def points(name: str, args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The command of each point of a curve."""

    def passes(model: str, count: int, length: int, devices: int = 1) -> list[str]:
        file = write_pairs(folder / f"{count}_{length}.jsonl", count, length)
        flags = f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
        own = [sys.executable, "-m", "experiments.benchmarks.scoring", model, str(file), "--pairs", str(count)]
        return ["env", flags, *own, "--mesh", f"data={devices}", "--max-length", str(length + 1), "--repeat", "2"]

    def random(size: str) -> str:
        write_model(size, args.tokenizer, folder / size)
        return str(folder / size)

    def whole(model: str, count: int, processes: int) -> list[str]:
        own = [sys.executable, "-m", "experiments.benchmarks.score_run", model, "--pairs", str(count)]
        return [*own, "--processes", str(processes)]

    model = str(Path(args.model).resolve())
    if name == "length":
        return {str(n): passes(model, max(1, TOKENS * 4 // (5 * n)), n) for n in args.lengths}
    if name == "size":
        return {size: passes(random(size), POSITIONS[size] // 320, 256) for size in args.sizes}
    if name == "devices":
        return {str(n): passes(model, 128, 256, n) for n in args.devices}
    smallest = random("1m")
    if name == "pairs":
        return {str(n): whole(smallest, n, 1) for n in args.counts}
    return {str(n): whole(smallest, 20_000, n) for n in args.processes}


if __name__ == "__main__":
    main()
