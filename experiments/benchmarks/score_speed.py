"""Scoring speed beside PyTorch, interleaved: the official way and a strong batched baseline.

    python -m experiments.benchmarks.score_speed --peers DIR --tokenizer DIR --data PAIRS.jsonl [--pairs 128]

``--peers`` holds ``torch_score.py`` (``--how official|batched``) and ``make_model.py``, which writes the random
30M-class Llama that all three score. Seconds are those of the scoring loop, tokenised rows in, numbers out; compilation
is told apart. The checksum of CHES must agree.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.benchmarks.measure import interleaved, keep, medians, usage


def ours(model_dir: str, pairs_file: str, count: int, repeat: int = 3) -> dict[str, float]:
    """Pack, run and sum up, as ``ches score`` does; the best of ``repeat`` passes over the data after a first one."""
    import numpy as np

    from ches_jax.data.packing import pack
    from ches_jax.data.sources import open_pairs
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
    from ches_jax.models.load import load_model
    from ches_jax.parallel import make_mesh
    from ches_jax.scores.passes import ScoringPass, fetch
    from ches_jax.scores.pipeline import ROW_TOKENS

    model = load_model(model_dir)
    rows = list(open_pairs(pairs_file))[:count]
    pairs = [p for p in PairTokenizer(load_tokenizer(model_dir), 1024)(rows) if not p.flags]
    run = ScoringPass(model, make_mesh("data=1"))

    def score() -> float:
        total, waiting = 0.0, []
        for batch, placements in pack(pairs, length=ROW_TOKENS, rows_per_batch=1, eos="include"):
            waiting.append((run(batch), placements))
        for statistics, placements in waiting:
            s = fetch(statistics)
            row, shared = (np.array([getattr(p, n) for p in placements]) for n in ("row", "shared"))
            plus, minus = (s.sums[row, shared] + s.sums[row, shared + side] for side in (1, 2))
            total += float((plus * minus - plus * plus).sum())
        return total

    first = time.perf_counter()
    total = score()
    first = time.perf_counter() - first
    best_cpu, best_wall = float("inf"), float("inf")
    for _ in range(repeat):
        cpu, wall = usage()["cpu_seconds"], time.perf_counter()
        score()
        best_wall = min(best_wall, time.perf_counter() - wall)
        best_cpu = min(best_cpu, usage()["cpu_seconds"] - cpu)
    weights = sum(p.size for n, p in _layer_weights(model))
    positions = sum(b.tokens.size for b, _ in pack(pairs, length=ROW_TOKENS, rows_per_batch=1, eos="include"))
    return {
        "pairs": len(pairs),
        "cpu_seconds": round(best_cpu, 3),
        "seconds": round(best_wall, 3),
        "first_pass_seconds": round(first, 3),
        "compile_seconds": round(run.compile_seconds, 3),
        "ches_sum": total,
        "positions": positions,
        "matmul_gflops": round(2 * weights * positions / best_wall / 1e9, 1),
        "matmul_peak_gflops": round(matmul_peak(), 1),
    }


def _layer_weights(model):
    from ches_jax.models.decoder import named_parameters

    return [(n, p) for n, p in named_parameters(model).items() if n.startswith("layers.") and p.ndim == 3]


def matmul_peak(n: int = 2048) -> float:
    """GFLOP/s of a large float32 ``jnp.dot`` in this process."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (n, n), jnp.float32)
    dot = jax.jit(lambda a: a @ a)
    dot(a).block_until_ready()
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        dot(a).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best / 1e9


def main() -> None:
    """Interleave the three ways and keep the table."""
    if len(sys.argv) > 1 and sys.argv[1] == "ours":
        print(json.dumps(ours(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = Path(tempfile.gettempdir()) / "ches_jax_benchmark_30m"
    peers, data = args.peers.resolve(), args.data.resolve()
    if not model.exists():
        words = [sys.executable, str(peers / "make_model.py"), str(model), "--tokenizer", str(args.tokenizer.resolve())]
        subprocess.run(words, check=True, capture_output=True)
    torch = [sys.executable, str(peers / "torch_score.py"), str(model), str(data), "--threads", "2"]
    commands = {
        "ours": [
            sys.executable,
            "-m",
            "experiments.benchmarks.score_speed",
            "ours",
            str(model),
            str(data),
            str(args.pairs),
        ],
        "torch batched": [*torch, "--how", "batched", "--pairs", str(args.pairs)],
        "torch official": [*torch, "--how", "official", "--pairs", str(args.pairs), "--repeat", "1"],
    }
    runs = interleaved(commands, args.repeats)
    table = {name: medians(found) for name, found in runs.items()}
    for name, row in table.items():
        print(f"{name:<16}{row['cpu_seconds']:8.2f} CPU s{row['seconds']:8.2f} s   checksum {row['ches_sum']:.6g}")
    ratios = {
        f"{name} / ours, {unit}": table[name][unit] / table["ours"][unit]
        for name in ("torch batched", "torch official")
        for unit in ("cpu_seconds", "seconds")
    }
    mine = table["ours"]
    ratios["useful matmul FLOP/s over peak"] = mine["matmul_gflops"] / mine["matmul_peak_gflops"]
    for name, value in ratios.items():
        print(f"{name:<40}{value:6.2f}")
    print(keep("score_speed_cpu", {"pairs": args.pairs, "table": table, "ratios": ratios, "runs": runs}))


if __name__ == "__main__":
    main()
