"""Cost of one DPO update beside TRL and tunix, interleaved: CPU seconds per step and peak memory of the process.

    python -m experiments.benchmarks.train_speed --peers DIR --tokenizer DIR --trl PYTHON --tunix PYTHON

``--peers`` holds ``trl_dpo.py``, ``tunix_dpo.py`` and ``make_model.py``; ``--trl`` and ``--tunix`` are interpreters of
environments that have those libraries (leave one out and it is not run). All train the same architecture (31.6M-class
random Llama, float32, AdamW) on 4 pairs of random tokens of fixed lengths; the reference log-probabilities are known
beforehand, except for tunix, which has no such thing. Ours is `ches train` itself: a step is what it runs per update.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import interleaved, keep, medians

LENGTHS = {"256+256": (256, 256), "384+128": (384, 128)}
VOCABULARY = 16384


def benchmark_model(peers: Path, tokenizer: Path) -> Path:
    """The random Llama that ours and TRL train; tunix builds the same one itself."""
    model = Path(tempfile.gettempdir()) / "ches_jax_benchmark_31m"
    if not model.exists():
        words = [sys.executable, str(peers / "make_model.py"), str(model), "--tokenizer", str(tokenizer)]
        subprocess.run([*words, "--vocab", str(VOCABULARY)], check=True, capture_output=True)
    return model


def compare(commands: dict[str, list[str]], repeats: int) -> dict[str, Any]:
    """Run the commands in turn; the table of medians and every peer's cost over ours."""
    runs = interleaved(commands, repeats)
    table = {name: medians(timings) for name, timings in runs.items()}
    for name, row in table.items():
        print(
            f"  {name:<8}{row['cpu_s_per_step_median']:8.2f} CPU s{row['s_per_step_median']:8.2f} s per step"
            f"{row['peak_rss_mib']:8.0f} MiB"
        )
    units = ("cpu_s_per_step_median", "s_per_step_median", "peak_rss_mib")
    ratios = {f"{n} / ours, {u}": table[n][u] / table["ours"][u] for n in table if n != "ours" for u in units}
    for name, value in ratios.items():
        print(f"  {name:<40}{value:6.2f}")
    return {"table": table, "ratios": ratios, "runs": runs}


def main() -> None:
    """Interleave the trainers at both lengths and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--trl", help="interpreter that has trl")
    parser.add_argument("--tunix", help="interpreter that has google-tunix")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    peers = args.peers.resolve()
    model = str(benchmark_model(peers, args.tokenizer.resolve()))
    results = {}
    for name, (prompt, response) in LENGTHS.items():
        same = ["--pairs", args.pairs, "--prompt-len", prompt, "--response-len", response, "--steps", args.steps]
        commands = {"ours": [sys.executable, "-m", "experiments.benchmarks.training", model, *same]}
        if args.tunix:
            commands["tunix"] = [args.tunix, peers / "tunix_dpo.py", *same, "--vocab", VOCABULARY]
        if args.trl:
            commands["trl"] = [args.trl, peers / "trl_dpo.py", model, *same]
        print(f"prompt + response {name}, {args.pairs} pairs")
        results[name] = compare({n: [str(w) for w in words] for n, words in commands.items()}, args.repeats)
    print(keep("train_speed_cpu", {"pairs": args.pairs, "lengths": results}))


if __name__ == "__main__":
    main()
