"""One scoring run of ours in a process of its own, as the benchmarks time it: prints one JSON line.

python -m experiments.benchmarks.scoring MODEL_DIR PAIRS.jsonl [--pairs 128 --head --mesh data=1 --repeat 3]
    [--dtype float32 --attention auto --batch-tokens 2048 --max-length 1024 --trace DIR]
"""

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from ches_jax.hugepages import with_large_pages
from experiments.benchmarks.costs import top_costs
from experiments.benchmarks.measure import usage


def measure(
    model_dir: str,
    pairs_file: str,
    count: int,
    *,
    head: bool,
    mesh: str,
    repeat: int,
    dtype: str = "float32",
    attention: str = "auto",
    batch_tokens: int | None = None,
    max_length: int = 1024,
    trace: str | None = None,
) -> dict[str, Any]:
    """Measure ``count`` pairs as ``ches score`` does, tokenised rows in, columns of the table out.

    The first pass compiles; of the ``repeat`` passes that follow the best one counts. ``matmul_gflops`` are useful
    ones: 2 x weights of the layers x positions that hold a token. With ``trace`` one more pass is profiled into that
    directory, and what cost most of it is named.
    """
    import jax

    from ches_jax.data.sources import open_pairs
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
    from ches_jax.distributed.mesh import make_mesh
    from ches_jax.models.attention.choose import choose_attention
    from ches_jax.models.checkpoint.load import load_model
    from ches_jax.models.decoder import named_parameters
    from ches_jax.runs.directory import device_name
    from ches_jax.scores.config import ROW_TOKENS
    from ches_jax.scores.forward import ForwardPass, Outputs
    from ches_jax.scores.scorer import Batching, PairScorer

    model = load_model(model_dir, dtype=dtype, param_dtype=None if dtype == "float32" else dtype)
    chosen = choose_attention(attention, model.config, dtype)
    rows = list(open_pairs(pairs_file))[:count]
    pairs = [p for p in PairTokenizer(load_tokenizer(model_dir), max_length)(rows) if not p.flags]
    run = ForwardPass(model, make_mesh(mesh), Outputs(head_score=head), chosen.attend)
    measurer = PairScorer(run, Batching.of(batch_tokens or ROW_TOKENS, ROW_TOKENS, run, None), "include")

    def once() -> tuple[float, float, float]:
        cpu, wall = usage()["cpu_seconds"], time.perf_counter()
        columns, _ = measurer(pairs)
        return usage()["cpu_seconds"] - cpu, time.perf_counter() - wall, float(sum(columns["ches"]))

    first_cpu, first_wall, total = once()
    passes = [once() for _ in range(repeat)]
    with jax.profiler.trace(trace) if trace else contextlib.nullcontext():
        if trace:
            once()
    weights = sum(p.size for n, p in named_parameters(model).items() if n.startswith("layers.") and p.ndim == 3)
    positions = sum(rows.tokens.size for rows, _ in measurer.batches(pairs))
    used = round(positions * (1 - measurer.waste))
    wall = min((p[1] for p in passes), default=first_wall)
    return {
        "pairs": len(pairs),
        "cpu_seconds": round(min((p[0] for p in passes), default=first_cpu), 3),
        "seconds": round(wall, 3),
        "with_compile_cpu_seconds": round(first_cpu, 3),
        "with_compile_seconds": round(first_wall, 3),
        "compile_seconds": round(run.compile_seconds, 3),
        "ches_sum": total,
        "positions": positions,
        "used_positions": used,
        "matmul_gflops": round(2 * weights * used / wall / 1e9, 1),
        "matmul_peak_gflops": round(matmul_peak(dtype), 1),
        "attention": chosen.name,
        "dtype": dtype,
        "platform": jax.default_backend(),
        "device": device_name(),
        **({"top_costs": top_costs(Path(trace))} if trace else {}),
    }


def matmul_peak(dtype: str = "float32") -> float:
    """GFLOP/s of a large matrix product in this process, at the precision that the models compute in."""
    import jax
    import jax.numpy as jnp

    from ches_jax.models.precision import matmul_precision

    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    dot = jax.jit(lambda a: jnp.matmul(a, a, precision=matmul_precision(a.dtype)))
    dot(a).block_until_ready()
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        dot(a).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best / 1e9


def main() -> None:
    """One run, in the pages that ``ches`` runs in."""
    with_large_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--head", action="store_true", help="the head score too")
    parser.add_argument("--mesh", default="data=1")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--max-length", type=int, default=1024, help="longer pairs are left out")
    parser.add_argument("--trace", help="profile one more pass into this directory")
    options = vars(parser.parse_args())
    print(json.dumps(measure(options.pop("model"), options.pop("file"), options.pop("pairs"), **options)))


if __name__ == "__main__":
    main()
