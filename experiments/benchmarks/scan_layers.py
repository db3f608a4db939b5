"""Scan over stacked layers, or a Python loop over them? Compile time and speed of the same pass.

python -m experiments.benchmarks.scan_layers
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.measure import interleaved, keep, medians

DEPTHS = (8, 24)


def measure(how: str, depth: int) -> dict[str, float]:
    """Compile and run one way in this process."""
    from ches_jax.models.decoder import Decoder
    from ches_jax.models.families.registry import decoder_config

    config = decoder_config(
        {
            "model_type": "llama",
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(1024, dtype=jnp.int32)[None] % 4096
    if how == "loop":
        # the same layers, one after the other: lax.scan with its body unrolled to the full depth
        scan = jax.lax.scan
        jax.lax.scan = lambda f, init, xs: scan(f, init, xs, unroll=depth)  # type: ignore[assignment]
    started = time.perf_counter()
    run = jax.jit(lambda m, t: m.hidden(t)).lower(model, tokens).compile()
    compiled = time.perf_counter() - started
    run(model, tokens).block_until_ready()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        run(model, tokens).block_until_ready()
        times.append(time.perf_counter() - started)
    return {"compile_seconds": round(compiled, 3), "run_seconds": round(min(times), 4)}


def main() -> None:
    """Measure both ways at each depth, in turn, and keep the table."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    commands = {
        f"{how} {depth} layers": [sys.executable, "-m", "experiments.benchmarks.scan_layers", how, str(depth)]
        for depth in DEPTHS
        for how in ("scan", "loop")
    }
    table = {name: medians(runs) for name, runs in interleaved(commands, 3).items()}
    for name, row in table.items():
        print(f"{name:<16} compile {row['compile_seconds']:6.2f} s   run {row['run_seconds']:7.4f} s")
    print(keep("scan_layers", {"table": table}))


if __name__ == "__main__":
    main()
