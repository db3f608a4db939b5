"""Scoring speed of billion-parameter classes on the accelerator at hand, in bfloat16, beside PyTorch on the same one.

    python -m experiments.benchmarks.accelerator_score --tokenizer DIR --data PAIRS.jsonl [--peers DIR] --size 1b 8b

Random Llamas of the shapes of Llama-3.2-1B and Llama-3.1-8B; the rows of ``--data`` (JSON lines) give the lengths, as
``--tokenizer`` cuts them, and those that the token audit flags are left out for all. ``--peers`` holds
``torch_score.py``, whose ``--how batched`` is run on the same GPU with each of ``--peer-tokens`` a batch; the fastest
counts. Model FLOP utilisation is 2 x weights of the layers x positions that hold a token, over the measured rate of a
large matrix product in bfloat16. One more pass is profiled, and what cost most of it is kept.

The result is named after the platform and the device that computed it. On a CPU only ``--size tiny`` runs, which times
nothing of interest and is not kept: it is there to test this file.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.accelerator import DTYPE, SHAPES, device_for, keep_of, write_on_host
from experiments.benchmarks.measure import interleaved, medians
from experiments.benchmarks.score_speed import SCORING, agree

TOLERANCE = 0.01
"""Checksums of CHES, relative: 16-bit rounding through all layers, averaged over the pairs."""
MAX_LENGTH = 1024
TORCH_DEVICE = {"gpu": "cuda", "cpu": "cpu"}


def write_rows(data: Path, tokenizer: Path, count: int, file: Path) -> None:
    """The first ``count`` rows without a flag, which every way cuts into the same tokens."""
    from ches_jax.data.sources import open_pairs
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer

    cut = PairTokenizer(load_tokenizer(tokenizer), MAX_LENGTH)
    lines = data.read_text(encoding="utf-8").splitlines()
    clean = (lines[pair.index] for row in open_pairs(str(data)) for pair in cut([row]) if not pair.flags)
    file.write_text("\n".join(itertools.islice(clean, count)) + "\n", encoding="utf-8")


def commands(model: str, data: str, args: argparse.Namespace, platform: str, trace: str) -> dict[str, list[str]]:
    """Ours, and the peer with each number of tokens a batch where torch can use the device."""
    count = ["--pairs", str(args.pairs)]
    ours = ["--dtype", DTYPE, "--attention", args.attention, "--batch-tokens", str(args.batch_tokens)]
    lines = {"ours": [*SCORING, model, data, *count, *ours, "--trace", trace]}
    if args.peers and platform in TORCH_DEVICE:
        torch = [sys.executable, str(args.peers.resolve() / "torch_score.py"), model, data, "--how", "batched", *count]
        torch += ["--dtype", DTYPE, "--device", TORCH_DEVICE[platform]]
        lines |= {f"torch batched {n}": [*torch, "--tokens", str(n)] for n in args.peer_tokens}
    return lines


def result(runs: dict[str, list[dict[str, Any]]], platform: str) -> dict[str, Any]:
    """Medians, utilisation, and the fastest peer over ours.

    Raises:
      SystemExit: numbers of another device than the one named, or of another computation.
    """
    table = {name: medians(timings) for name, timings in runs.items()}
    used = {name: row.get("platform") or row["device"] for name, row in table.items()}
    for name, where in used.items():
        if where != (platform if name == "ours" else TORCH_DEVICE[platform]):
            raise SystemExit(f"{name} ran on {where}, not on the {platform}: nothing is written")
    agree(table, TOLERANCE)
    own = table["ours"]
    ratios = {"model FLOP utilisation": own["matmul_gflops"] / own["matmul_peak_gflops"]}
    peers = {name: row["seconds"] for name, row in table.items() if name != "ours"}
    if peers:
        best = min(peers, key=lambda name: peers[name])
        ratios[f"{best} / ours, seconds"] = peers[best] / own["seconds"]
    return {"platform": platform, "device": own["device"], "table": table, "ratios": ratios, "runs": runs}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the models, run the ways in turn, keep a file for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--peer-tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trace", help="directory that keeps the profile of one pass of ours")
    args = parser.parse_args(argv)
    here = device_for(args.size)
    for size in args.size:
        with tempfile.TemporaryDirectory() as folder:
            write_on_host(size, args.tokenizer, folder)
            rows = Path(folder) / "rows.jsonl"
            write_rows(args.data, args.tokenizer, args.pairs, rows)
            ways = commands(folder, str(rows), args, here["platform"], args.trace or f"{folder}/trace")
            measured = result(interleaved(ways, args.repeats), here["platform"])
        for name, row in measured["table"].items():
            print(f"{size} {name:<22}{row['seconds']:9.3f} s{row['pairs'] / row['seconds']:9.1f} pairs/s")
        for name, value in measured["ratios"].items():
            print(f"{size} {name:<40}{value:6.2f}")
        for cost in measured["table"]["ours"]["top_costs"][:5]:
            print(f"{size} {100 * cost['share']:5.1f} %  {cost['name']}")
        keep_of(here, f"accelerator_score_{size}", {"size": size, "pairs": args.pairs, **measured})


if __name__ == "__main__":
    main()
