"""Attention's part of a layer's forward pass on a CPU, by the size of its blocks.

    python -m experiments.benchmarks.attention_share --tokenizer DIR --data PAIRS.jsonl [--row-tokens 2048 --repeats 8]

A layer of the 30M class (width 512, 8 x 4 heads of 64, feed-forward 1,376) in float32, on packed rows of real pairs:
CPU milliseconds of its matrix products alone, and of attention in blocks of each size, in turn in one process; medians.
A batch is a row, and as many of them are computed side by side as scoring does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.measure import keep

WIDTH, FEED_FORWARD, HEADS, KEY_HEADS, CHANNELS = 512, 1376, 8, 4, 64
PAIRS = 400
SIZES = (16, 32, 64, 128)


def products(key: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The matrix products of a layer, one after the other, of states [positions, width]."""
    shapes = [
        (WIDTH, HEADS * CHANNELS), (WIDTH, KEY_HEADS * CHANNELS), (WIDTH, KEY_HEADS * CHANNELS),
        (HEADS * CHANNELS, WIDTH), (WIDTH, FEED_FORWARD), (WIDTH, FEED_FORWARD), (FEED_FORWARD, WIDTH),
    ]  # fmt: skip
    weights = [jax.random.normal(k, shape) for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)]

    def run(states: jax.Array, weights: list[jax.Array]) -> jax.Array:
        queries, *others = weights
        q = states @ queries
        key_values = [states @ w for w in others[:2]]
        mixed = q @ others[2]
        up = (states @ others[3]) * (states @ others[4])
        return mixed + up @ others[5] + sum(a.sum() for a in key_values)

    compiled = jax.jit(run)
    return lambda states: compiled(states, weights)


def attention(tokenizer: str, data: str, row_tokens: int) -> tuple[dict[int, Callable[[], jax.Array]], int]:
    """Attention over the first rows of the pairs by block size; how many positions of 100 hold a token."""
    from ches_jax.data.packing import pack, packed_length
    from ches_jax.data.sources import open_pairs
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
    from ches_jax.models.attention.block_sparse import blocks
    from ches_jax.models.attention.dense import AttentionInputs, AttentionParams
    from ches_jax.models.attention.mask import Visibility, key_ranges

    every = PairTokenizer(load_tokenizer(tokenizer), row_tokens)(list(open_pairs(data))[:PAIRS])
    some = [p for p in every if not p.flags and packed_length(p) <= row_tokens]
    # as they come: the packing of all would begin with the longest
    pairs = [p for p, end in zip(some, accumulate(map(packed_length, some)), strict=True) if end <= row_tokens]
    batch, _ = next(iter(pack(pairs, length=row_tokens, rows_per_batch=1, eos="include")))
    seen = batch.context_start, batch.context_end, batch.own_start
    ranges = key_ranges(Visibility(*map(jnp.asarray, seen)))
    group = HEADS // KEY_HEADS
    q, k, v = (
        jax.random.normal(key, (1, row_tokens, *shape))
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3),
            ((KEY_HEADS, group, CHANNELS), (KEY_HEADS, CHANNELS), (KEY_HEADS, CHANNELS)),
            strict=True,
        )
    )
    params = AttentionParams(CHANNELS**-0.5, None)

    def of_size(block: int) -> Callable[[], jax.Array]:
        run = jax.jit(lambda q, k, v: blocks(AttentionInputs(q, k, v, ranges), params, block))
        return lambda: run(q, k, v)

    return {size: of_size(size) for size in SIZES}, round(100 * float((batch.lengths > 0).mean()))


def main() -> None:
    """Measure in turn, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--name", default="attention_share", help="of the file in results")
    args = parser.parse_args()
    from ches_jax.distributed.mesh import make_mesh
    from ches_jax.distributed.under_way import UnderWay

    by_size, filled = attention(args.tokenizer, str(args.data), args.row_tokens)
    of_layer, states = products(jax.random.key(1)), jax.random.normal(jax.random.key(2), (args.row_tokens, WIDTH))
    ways: dict[str, Callable[[], Any]] = {
        "matrix products": lambda: of_layer(states),
        **{f"blocks of {n}": run for n, run in by_size.items()},
    }
    start = UnderWay(make_mesh("data=1"))
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats + 1):  # the first one compiles
        for name, run in ways.items():
            begun = time.process_time()
            for result in [start(run) for _ in range(start.count)]:
                jax.block_until_ready(result())
            if turn:
                spent[name].append(1e3 * (time.process_time() - begun) / start.count)
    median = {name: statistics.median(times) for name, times in spent.items()}
    whole = median["matrix products"]
    table = {
        name: {"cpu_ms": round(ms, 1), **({} if ms == whole else {"share": round(ms / (ms + whole), 3)})}
        for name, ms in median.items()
    }
    for name, row in table.items():
        print(f"  {name:<18}{row['cpu_ms']:8.1f} CPU ms" + (f"{row['share']:8.1%} of both" if "share" in row else ""))
    about = {"row_tokens": args.row_tokens, "filled_percent": filled, "side_by_side": start.count}
    print(keep(args.name, {**about, "table": table}))


if __name__ == "__main__":
    main()
