"""How the cost of scoring grows with length, number of pairs and devices; the share of the matmul peak at each point.

    python -m experiments.benchmarks.score_scaling --model DIR [--lengths 128 ... --pairs 32 ... --devices 1 2]

The pairs are random tokens. Lengths are those of prompt + response (three quarters prompt), at a constant number of
positions; devices are virtual ones on a CPU, which share its cores, and real ones elsewhere.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.measure import interleaved, keep, medians

TOKENS = 24_576
"""Positions of every point of the curve of lengths."""


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
        row["share_of_matmul_peak"] = round(row["matmul_gflops"] / row["matmul_peak_gflops"], 3)
        row["positions_per_second"] = round(row["used_positions"] / row["seconds"], 1)
        print(
            f"  {point:>6}{row['pairs'] / row['seconds']:10.1f} pairs/s"
            f"{row['positions_per_second']:10.0f} positions/s"
            f"{row['cpu_seconds']:8.2f} CPU s   {row['share_of_matmul_peak']:.2f} of the matmul peak"
        )
    return table


def main() -> None:
    """The three curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--pairs", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = str(Path(args.model).resolve())
    result = {}
    with tempfile.TemporaryDirectory() as folder:

        def command(count: int, length: int, devices: int = 1) -> list[str]:
            file = write_pairs(Path(folder) / f"{count}_{length}.jsonl", count, length)
            flags = f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
            own = [sys.executable, "-m", "experiments.benchmarks.scoring", model, str(file), "--pairs", str(count)]
            return ["env", flags, *own, "--mesh", f"data={devices}"]

        lengths = {str(n): command(TOKENS * 4 // (5 * n), n) for n in args.lengths}
        result["length"] = curve("prompt + response, tokens", lengths, args.repeats)
        counts = {str(n): command(n, 256) for n in args.pairs}
        result["pairs"] = curve("pairs of 192 + 64 tokens", counts, args.repeats)
        devices = {str(n): command(128, 256, n) for n in args.devices}
        result["devices"] = curve("devices, 128 pairs", devices, args.repeats)
    print(keep("score_scaling", {"table": result}))


if __name__ == "__main__":
    main()
