"""Cost of one DPO update beside TRL and tunix, interleaved: CPU seconds per step and peak memory of the process.

    python -m experiments.benchmarks.train_speed --peers DIR --tokenizer DIR --trl PYTHON --tunix PYTHON

``--peers`` holds ``trl_dpo.py``, ``tunix_dpo.py`` and ``make_model.py``; ``--trl`` and ``--tunix`` are interpreters of
environments that have those libraries (leave one out and it is not run). All train the same architecture (31.6M-class
random Llama, float32, AdamW) on 4 pairs of random tokens of fixed lengths; the reference log-probabilities are known
beforehand, except for tunix, which has no such thing. Ours is `ches train` itself: a step is what it runs per update.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ches_jax.pages import with_large_pages
from experiments.benchmarks.measure import interleaved, keep, medians, usage

LENGTHS = {"256+256": (256, 256), "384+128": (384, 128)}
VOCABULARY = 16384


def ours(model: str, pairs: int, prompt: int, response: int, steps: int) -> dict[str, Any]:
    """Run ``ches train`` for ``steps`` updates after a first one, with a clock around its step."""
    import numpy as np

    from ches_jax.train import loop
    from ches_jax.train.config import TrainConfig

    seconds, cpu = [], []

    class Timed(loop.Step):
        def __call__(self, *args: Any, **options: Any) -> Any:
            wall, used = time.perf_counter(), time.process_time()
            result = super().__call__(*args, **options)  # its metrics are on the host: the step is over
            seconds.append(time.perf_counter() - wall)
            cpu.append(time.process_time() - used)
            return result

    loop.Step = Timed  # type: ignore[misc]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        lengths = {"prompt_ids": prompt, "chosen_ids": response, "rejected_ids": response}
        with file.open("w", encoding="utf-8") as out:
            for _ in range(pairs * (steps + 1)):
                row = {name: rng.integers(100, 1000, n).tolist() for name, n in lengths.items()}
                out.write(json.dumps(row) + "\n")
        config = TrainConfig(
            model=model, pairs=str(file), out=f"{folder}/run", optimizer="adamw", lr=1e-6, batch_size=pairs,
            watch=pairs, mesh="data=1", on_bad_row="keep", export=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            loop.train(config, quiet=True)
    return {
        "s_per_step_median": statistics.median(seconds[1:]),
        "cpu_s_per_step_median": statistics.median(cpu[1:]),
        "first_step_s": seconds[0],
        "steps": len(seconds) - 1,
        "peak_rss_mib": usage()["peak_rss_mb"],
    }


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
    table = {name: medians(found) for name, found in runs.items()}
    for name, row in table.items():
        print(f"  {name:<8}{row['cpu_s_per_step_median']:8.2f} CPU s{row['s_per_step_median']:8.2f} s per step"
              f"{row['peak_rss_mib']:8.0f} MiB")  # fmt: skip
    units = ("cpu_s_per_step_median", "s_per_step_median", "peak_rss_mib")
    ratios = {f"{n} / ours, {u}": table[n][u] / table["ours"][u] for n in table if n != "ours" for u in units}
    for name, value in ratios.items():
        print(f"  {name:<40}{value:6.2f}")
    return {"table": table, "ratios": ratios, "runs": runs}


def main() -> None:
    """Interleave the trainers at both lengths and keep the table."""
    if len(sys.argv) > 1 and sys.argv[1] == "ours":
        with_large_pages()  # as `ches` does
        model, *numbers = sys.argv[2:]
        print(json.dumps(ours(model, *map(int, numbers))))
        return
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
        own = [sys.executable, "-m", "experiments.benchmarks.train_speed", "ours", model]
        commands = {"ours": [*own, args.pairs, prompt, response, args.steps]}
        if args.tunix:
            commands["tunix"] = [args.tunix, peers / "tunix_dpo.py", *same, "--vocab", VOCABULARY]
        if args.trl:
            commands["trl"] = [args.trl, peers / "trl_dpo.py", model, *same]
        print(f"prompt + response {name}, {args.pairs} pairs")
        results[name] = compare({n: [str(w) for w in words] for n, words in commands.items()}, args.repeats)
    print(keep("train_speed_cpu", {"pairs": args.pairs, "lengths": results}))


if __name__ == "__main__":
    main()
