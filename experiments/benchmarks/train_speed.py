"""Cost of one DPO update beside other trainers, interleaved: CPU seconds per step, the first step, and peak memory.

    python -m experiments.benchmarks.train_speed --peers DIR --tokenizer DIR
        [--trl PYTHON --tunix PYTHON --easydel PYTHON --ultrafeedback FILE]
        [--cases 256+256 384+128 ultrafeedback lora --before FILE]

``--peers`` holds ``tunix_dpo.py`` and ``make_model.py``; ``--trl``, ``--tunix`` and ``--easydel`` are interpreters of
environments that have those libraries (leave one out and it is not run). All train the same architecture (31.6M-class
random Llama, float32, AdamW) on 4 pairs of random tokens; the reference log-probabilities are known beforehand, except
for tunix, which has no such thing. Ours is `ches train` itself: a step is what it runs per update.

- ``256+256``, ``384+128``: fixed lengths of prompt + responses.
- ``ultrafeedback``: the lengths of four real pairs, at the eighths 1, 3, 5 and 7 of the first 64 by length, prompts and
  responses cut at 512 tokens each. Ours packs them, TRL pads to the longest of the batch; tunix and EasyDeL have fixed
  shapes, so they are given the longest prompt and response for all, and what they cost is that of their padding too.
- ``lora``: adapters of rank 8 on all linear layers, 256+256, ours and TRL with peft.

The first step is cold: no compilation cache on the disk is read. ``--before`` names an earlier result; its first steps
stand beside these. TRL's log-probabilities in tiles are its only way since 1.16, so they are what is measured. What
others used of the machine is recorded with each run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import interleaved, keep, medians

LENGTHS = {"256+256": (256, 256), "384+128": (384, 128), "lora": (256, 256)}
CASES = ("256+256", "384+128", "ultrafeedback", "lora")
VOCABULARY = 16384
LORA_RANK = 8
MOST = 512
"""Tokens that real prompts and responses are cut at."""
FIRST = 64
"""Real pairs whose lengths are looked at."""
COLD = ("env", "JAX_ENABLE_COMPILATION_CACHE=false")
"""In front of a command: jax reads no compiled program from the disk."""


def benchmark_model(peers: Path, tokenizer: Path) -> Path:
    """The random Llama that ours, TRL and EasyDeL train; tunix builds the same one itself."""
    model = Path(tempfile.gettempdir()) / "ches_jax_benchmark_31m"
    if not model.exists():
        words = [sys.executable, str(peers / "make_model.py"), str(model), "--tokenizer", str(tokenizer)]
        subprocess.run([*words, "--vocab", str(VOCABULARY)], check=True, capture_output=True)
    return model


def real_lengths(pairs: str, tokenizer: Path) -> list[list[int]]:
    """Tokens of prompt, chosen and rejected of the first ``FIRST`` sound pairs, each cut at ``MOST``."""
    from ches_jax.data.sources import open_pairs
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer

    cut = PairTokenizer(load_tokenizer(tokenizer), 1 << 20)
    lengths: list[list[int]] = []
    for record in open_pairs(pairs):
        (pair,) = cut([record])
        if pair.flags:
            continue
        whole = (len(pair.prompt), len(pair.chosen.content), len(pair.rejected.content))
        lengths.append([min(n, MOST) for n in whole])
        if len(lengths) == FIRST:
            break
    return lengths


def spread(lengths: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """So many of them, evenly from the short ones to the long ones.

    >>> spread([[n, 0, 0] for n in (4, 1, 3, 2)], 2)
    [[2, 0, 0], [4, 0, 0]]
    """
    ordered = sorted((list(one) for one in lengths), key=sum)
    return [ordered[(2 * k + 1) * len(ordered) // (2 * count)] for k in range(count)]


def commands(
    case: str, model: str, peers: Path, pairs: int, steps: int, interpreters: Mapping[str, str], lengths: Path
) -> dict[str, list[str]]:
    """Every trainer that has this case; ``interpreters`` are those of the others that are at hand."""
    prompt, response = LENGTHS.get(case) or longest(json.loads(lengths.read_text(encoding="utf-8")))
    fixed = ["--pairs", str(pairs), "--prompt-len", str(prompt), "--response-len", str(response), "--steps", str(steps)]
    more = ["--lengths", str(lengths)] if case == "ultrafeedback" else []
    more += ["--lora-rank", str(LORA_RANK)] if case == "lora" else []
    able = {"ours": [*COLD, sys.executable, "-m", "experiments.benchmarks.training", model, *fixed, *more]}
    if "tunix" in interpreters and case != "lora":
        words = [interpreters["tunix"], str(peers / "tunix_dpo.py"), *fixed, "--vocab", str(VOCABULARY)]
        able["tunix"] = [*COLD, *words]
    if "easydel" in interpreters and case != "lora":
        own = "EASYDEL_CACHE_COMPILES=false"
        words = [interpreters["easydel"], "-m", "experiments.benchmarks.easydel_training", model, *fixed, *more]
        able["easydel"] = [*COLD, own, *words]
    if "trl" in interpreters:
        able["trl"] = [interpreters["trl"], "-m", "experiments.benchmarks.trl_training", model, *fixed, *more]
    return able


def longest(lengths: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The longest prompt and the longest response.

    >>> longest([[3, 1, 2], [1, 4, 1]])
    (3, 4)
    """
    return max(p for p, _, _ in lengths), max(max(c, r) for _, c, r in lengths)


def compare(commands: dict[str, list[str]], repeats: int) -> dict[str, Any]:
    """Run the commands in turn; the table of medians and every peer's cost over ours, with the least and the most."""
    runs = interleaved(commands, repeats)
    table = {name: medians(timings) for name, timings in runs.items()}
    for name, row in table.items():
        print(
            f"  {name:<8}{row['cpu_s_per_step_median']:8.2f} CPU s{row['s_per_step_median']:8.2f} s per step"
            f"{row['first_step_s']:8.2f} s the first{row['peak_rss_mib']:8.0f} MiB"
            f"   others {row['others']:.2f}, steal {row['steal']:.2f}"
        )
    units = ("cpu_s_per_step_median", "s_per_step_median", "peak_rss_mib")
    ratios = {f"{n} / ours, {u}": table[n][u] / table["ours"][u] for n in table if n != "ours" for u in units}
    spans = {}
    for name in (n for n in runs if n != "ours"):
        for unit in units:
            each = [theirs[unit] / ours[unit] for theirs, ours in zip(runs[name], runs["ours"], strict=True)]
            spans[f"{name} / ours, {unit}"] = [min(each), max(each)]
    for name, value in ratios.items():
        print(f"  {name:<40}{value:6.2f} [{spans[name][0]:.2f}, {spans[name][1]:.2f}]")
    return {"table": table, "ratios": ratios, "ranges": spans, "runs": runs}


def first_steps(before: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Seconds of our first step in an earlier result and in this one, case by case."""
    earlier = before.get("lengths", {})
    both = {
        case: {
            name: {u: table["ours"].get(u) for u in ("first_step_s", "first_step_cpu_s")}
            for name, table in (("before", earlier[case]["table"]), ("now", now["table"]))
        }
        for case, now in results.items()
        if case in earlier
    }
    return {"commit": before.get("environment", {}).get("commit"), "cpu": before["environment"].get("cpu"), **both}


def main() -> None:
    """Interleave the trainers in every case and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--trl", help="interpreter that has trl")
    parser.add_argument("--tunix", help="interpreter that has google-tunix")
    parser.add_argument("--easydel", help="interpreter that has easydel, and pillow")
    parser.add_argument("--ultrafeedback", help="rows whose lengths are taken; without it that case is not run")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--before", type=Path, help="an earlier result, whose first steps stand beside these")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="train_speed_cpu", help="of the file in results")
    args = parser.parse_args()
    peers, tokenizer = args.peers.resolve(), args.tokenizer.resolve()
    model = str(benchmark_model(peers, tokenizer))
    interpreters = {name: getattr(args, name) for name in ("tunix", "easydel", "trl") if getattr(args, name)}
    before = json.loads(args.before.read_text(encoding="utf-8")) if args.before else None
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        lengths = Path(folder) / "lengths.json"
        if args.ultrafeedback:
            chosen = spread(real_lengths(args.ultrafeedback, tokenizer), args.pairs)
            lengths.write_text(json.dumps(chosen), encoding="utf-8")
        for case in args.cases:
            if case == "ultrafeedback" and not args.ultrafeedback:
                print("ultrafeedback: not run, no --ultrafeedback")
                continue
            print(f"prompt + response {case}, {args.pairs} pairs")
            able = commands(case, model, peers, args.pairs, args.steps, interpreters, lengths)
            results[case] = compare(able, args.repeats)
            if case == "ultrafeedback":
                results[case]["lengths_of_pairs"] = json.loads(lengths.read_text(encoding="utf-8"))
                results[case]["tunix_lengths"] = longest(results[case]["lengths_of_pairs"])
    result = {"pairs": args.pairs, "steps": args.steps, "repeats": args.repeats, "lengths": results}
    if before is not None:
        result["first_step"] = first_steps(before, results)
        print("first step, before and now:", json.dumps(result["first_step"]))
    print(keep(args.name, result))


if __name__ == "__main__":
    main()
