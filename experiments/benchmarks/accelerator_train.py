"""A DPO step of billion-parameter classes on the accelerator at hand, in bfloat16, beside TRL on the same one.

    python -m experiments.benchmarks.accelerator_train --tokenizer DIR [--trl PYTHON] --size 1b [--pairs 4 16]

Random Llamas of ``accelerator``'s shapes, random tokens of the lengths of ``train_speed``, float32 weights and
AdamW, products in bfloat16, the reference's log-probabilities known beforehand. PYTHON is an interpreter that has TRL
and a torch that can use the device; TRL's own number of pairs a batch is ours. Model FLOP utilisation is
``training.needed_gflop`` a second over the measured rate of a large matrix product in bfloat16: attention and what is
computed again count for nothing. One more update is profiled, and what cost most of it is kept.

The result is named after the device that computed it. On a CPU only ``--size tiny`` runs, which times nothing of
interest and is not kept: it is there to test this file.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.accelerator import DTYPE, SHAPES, device_for, keep_of, write_on_host
from experiments.benchmarks.measure import interleaved, medians
from experiments.benchmarks.train_speed import LENGTHS

OURS = [sys.executable, "-m", "experiments.benchmarks.training"]


def commands(
    model: str, pairs: int, lengths: tuple[int, int], steps: int, trl: str | None, trace: str
) -> dict[str, list[str]]:
    """Ours, and TRL where there is an interpreter for it."""
    prompt, response = lengths
    sizes = {"--pairs": pairs, "--prompt-len": prompt, "--response-len": response, "--steps": steps, "--dtype": DTYPE}
    same = [model, *(str(w) for option in sizes.items() for w in option)]
    return {
        "ours": [*OURS, *same, "--trace", trace],
        **({"trl": [trl, "-m", "experiments.benchmarks.trl_training", *same]} if trl else {}),
    }


def result(runs: Mapping[str, Sequence[Mapping[str, Any]]], platform: str) -> dict[str, Any]:
    """Medians, utilisation, and TRL over ours.

    Raises:
      SystemExit: numbers of another device than the one named.
    """
    table = {name: medians(timings) for name, timings in runs.items()}
    for name, row in table.items():
        if row["platform"] != platform:
            raise SystemExit(f"{name} ran on {row['platform']}, not on the {platform}: nothing is written")
    ours = table["ours"]
    rate = ours["needed_gflop"] / ours["s_per_step_median"]
    ratios = {"model FLOP utilisation": rate / ours["matmul_peak_gflops"]}
    if "trl" in table:
        ratios["trl / ours, seconds"] = table["trl"]["s_per_step_median"] / ours["s_per_step_median"]
    return {"device": ours["device"], "table": table, "ratios": ratios, "runs": runs}


def table_text(size: str, title: str, measured: Mapping[str, Any]) -> str:
    """The result as lines to read."""
    seconds = [f"{name:<6}{row['s_per_step_median'] * 1e3:10.1f} ms a step" for name, row in measured["table"].items()]
    ratios = [f"{name:<28}{value:6.2f}" for name, value in measured["ratios"].items()]
    costs = [f"{100 * c['share']:5.1f} %  {c['name']}" for c in measured["table"]["ours"]["top_costs"][:5]]
    return "\n".join(f"{size} {title}  {line}" for line in [*seconds, *ratios, *costs])


def main(argv: Sequence[str] | None = None) -> None:
    """Write the models, run the trainers in turn, keep a file for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["1b"])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--trl", help="interpreter that has trl")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    here = device_for(args.size)
    for size in args.size:
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            write_on_host(size, args.tokenizer, f"{folder}/model")
            for pairs in args.pairs:
                for name in args.lengths:
                    title, trace = f"{pairs} pairs of {name}", f"{folder}/trace_{pairs}_{name}"
                    ways = commands(f"{folder}/model", pairs, LENGTHS[name], args.steps, args.trl, trace)
                    results[title] = result(interleaved(ways, args.repeats), here["platform"])
                    print(table_text(size, title, results[title]), flush=True)
        keep_of(here, f"accelerator_train_{size}", {"size": size, "results": results})


if __name__ == "__main__":
    main()
