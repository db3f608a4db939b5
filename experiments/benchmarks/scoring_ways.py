"""One way of scoring in a process that waits between passes; started by ``side_by_side``.

    python -m experiments.benchmarks.scoring_ways WAY MODEL ROWS.json THREADS

Ways: ``ours``; ``torch-official`` (one sequence at a time, with logits and all hidden states, as the paper's scripts);
``torch-batched`` (no head, sorted by length, padded batches of 2,048 tokens); ``torch-packed`` (no head, sequences
packed into rows of 2,048 by first-fit decreasing, ``sdpa`` with a block mask). It prints one JSON line when it is warm,
and one after each line that it reads.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TOKENS = 2048
PROJECTIONS = 4
"""The first matrices of ``shapes_of`` are those of attention; the others, of the MLP."""
Row = dict[str, list[int]]


class Way(NamedTuple):
    """A way that is loaded."""

    score: Callable[[], float]
    """Makes one pass; the sum of CHES over all pairs."""
    multiply: Callable[[], None]
    """Multiplies matrices of the shapes of a layer, once."""
    weights: int
    """In the matrices of all layers."""
    layers: int
    positions: Callable[[], int]
    """That the passes so far have computed, padding included; called after the first."""


def limit_threads(count: int) -> None:
    """This process and what it starts run on so many processors; to be called before any library is imported."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC", "RAYON_NUM_THREADS"):
        os.environ[name] = str(count)


def shapes_of(config: Any) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrices of a layer of a Llama."""
    h, f = config["hidden_size"], config["intermediate_size"]
    kv = h * config["num_key_value_heads"] // config["num_attention_heads"]
    return [(h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h)]


def sequences(rows: Sequence[Row]) -> list[tuple[int, int, int, list[int]]]:
    """(pair, side, where the states that predict begin, ids) of every response with its prompt."""
    return [
        (i, side, len(row["prompt"]) - 1, [*row["prompt"], *row[name]])
        for i, row in enumerate(rows)
        for side, name in enumerate(("chosen", "rejected"))
    ]


def ours(model_dir: str, rows: Sequence[Row]) -> Way:
    """As ``ches score`` computes, from token ids to the columns of the table."""
    import jax
    import jax.numpy as jnp

    from ches_jax.distributed.mesh import make_mesh
    from ches_jax.models.attention.choose import choose_attention
    from ches_jax.models.checkpoint.load import load_model
    from ches_jax.models.decoder import named_parameters
    from ches_jax.models.layers import PIECE
    from ches_jax.scores.forward import Outputs
    from ches_jax.scores.in_memory import pair_scorer
    from ches_jax.types import Response, TokenPair

    model = load_model(model_dir)
    attend = choose_attention("auto", model.config, "float32").attend
    scorer = pair_scorer(model, make_mesh("data=1"), Outputs(), attend, batch_tokens=TOKENS, eos="include")
    pairs = [
        TokenPair(
            row_id=str(i),
            index=i,
            prompt=tuple(row["prompt"]),
            chosen=Response(tuple(row["chosen"]), 0),
            rejected=Response(tuple(row["rejected"]), 0),
        )
        for i, row in enumerate(rows)
    ]
    config = json.loads(Path(model_dir, "config.json").read_text(encoding="utf-8"))
    key = jax.random.key(0)
    inputs = {(t, n): jax.random.normal(key, (t, n)) for t in (TOKENS, PIECE) for n, _ in shapes_of(config)}
    matrices = [jax.random.normal(key, shape) for shape in shapes_of(config)]
    product = jax.jit(lambda a, b: jnp.dot(a, b))
    weights = sum(p.size for n, p in named_parameters(model).items() if n.startswith("layers.") and p.ndim == 3)

    def multiply() -> None:
        for number, b in enumerate(matrices):
            at_once = TOKENS if number < PROJECTIONS else PIECE
            for _ in range(TOKENS // at_once):
                product(inputs[at_once, b.shape[0]], b).block_until_ready()

    def positions() -> int:
        return scorer.counted.computed

    return Way(lambda: float(sum(scorer(pairs)[0]["ches"])), multiply, weights, model.config.num_layers, positions)


def torch_way(way: str, model_dir: str, rows: Sequence[Row], threads: int) -> Way:
    """A way of PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    every = sequences(rows)
    plans = {"torch-official": _one_by_one, "torch-batched": _padded, "torch-packed": _packed}[way](every)

    def score() -> float:
        sums = {}
        with torch.no_grad():
            for plan in plans:
                tokens, mask, places = torch.tensor(plan.tokens), plan.mask, plan.places
                if way == "torch-official":
                    hidden = model(tokens, output_hidden_states=True).hidden_states[-1]
                elif way == "torch-batched":
                    hidden = model.model(tokens, attention_mask=torch.tensor(mask), use_cache=False).last_hidden_state
                else:
                    own = torch.tensor(mask)
                    seen = (own[:, None] == own[None, :]).tril()[None, None]
                    at = torch.tensor(plan.positions)[None]
                    hidden = model.model(
                        tokens, attention_mask=seen, position_ids=at, use_cache=False
                    ).last_hidden_state
                for pair, side, line, start, stop in places:
                    sums[pair, side] = hidden[line, start:stop].double().sum(0)
        total = 0.0
        for pair in range(len(rows)):
            plus, minus = sums[pair, 0], sums[pair, 1]
            total += float(plus @ minus - plus @ plus)
        return total

    layer_weights = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    shapes = shapes_of(model.config.to_dict())
    inputs = {n: torch.randn(TOKENS, n) for n, _ in shapes}
    matrices = [torch.randn(*shape) for shape in shapes]

    def multiply() -> None:
        for b in matrices:
            torch.mm(inputs[b.shape[0]], b)

    positions = sum(sum(map(len, plan.tokens)) for plan in plans)
    weights = sum(p.numel() for p in layer_weights)
    return Way(score, multiply, weights, model.config.num_hidden_layers, lambda: positions)


class Plan(NamedTuple):
    """A batch: rows of ids, their mask (1 for tokens; of a packed row the number of the sequence), where states lie."""

    tokens: list[list[int]]
    mask: list[Any]
    places: list[tuple[int, int, int, int, int]]
    """(pair, side, row, first state, behind the last)."""
    positions: list[int] = []  # noqa: RUF012
    """Of a packed row."""


def _one_by_one(every: Sequence[tuple[int, int, int, list[int]]]) -> list[Plan]:
    return [Plan([ids], [], [(i, side, 0, start, len(ids))]) for i, side, start, ids in every]


def _padded(every: Sequence[tuple[int, int, int, list[int]]]) -> list[Plan]:
    plans, batch = [], []

    def flush() -> None:
        width = max(len(s[3]) for s in batch)
        plans.append(
            Plan(
                [ids + [0] * (width - len(ids)) for *_, ids in batch],
                [[1] * len(ids) + [0] * (width - len(ids)) for *_, ids in batch],
                [(i, side, k, start, len(ids)) for k, (i, side, start, ids) in enumerate(batch)],
            )
        )
        batch.clear()

    for one in sorted(every, key=lambda s: -len(s[3])):
        if batch and len(batch[0][3]) * (len(batch) + 1) > TOKENS:
            flush()
        batch.append(one)
    flush()
    return plans


def _packed(every: Sequence[tuple[int, int, int, list[int]]]) -> list[Plan]:
    from ches_jax.data.packing import first_fit_decreasing

    plans = []
    lengths = [len(s[3]) for s in every]
    for group in first_fit_decreasing(lengths, TOKENS, max_pairs=len(every)):
        ids: list[int] = []
        own: list[int] = []
        at: list[int] = []
        places = []
        for number, k in enumerate(group, 1):
            i, side, start, one = every[k]
            places.append((i, side, 0, len(ids) + start, len(ids) + len(one)))
            ids += one
            own += [number] * len(one)
            at += range(len(one))
        plans.append(Plan([ids], own, places, at))
    return plans


def cpu_seconds() -> float:
    """Of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Warm, then a pass and the peak for each line of standard input."""
    way, model, rows_file, threads = sys.argv[1:]
    limit_threads(int(threads))
    with open(rows_file, encoding="utf-8") as file:
        rows = json.load(file)
    loaded = ours(model, rows) if way == "ours" else torch_way(way, model, rows, int(threads))
    begun = cpu_seconds()
    total = loaded.score()
    warming, positions = cpu_seconds() - begun, loaded.positions()
    loaded.score()  # a second pass, as the first compiles or fills caches
    loaded.multiply()
    ready = {"ches_sum": total, "weights": loaded.weights, "positions": positions}
    print(json.dumps({**ready, "warming_cpu_seconds": round(warming, 3)}), flush=True)
    per_layer = 2 * TOKENS * loaded.weights / loaded.layers
    for _ in sys.stdin:
        start, wall = cpu_seconds(), time.perf_counter()
        loaded.score()
        passed, seconds = cpu_seconds() - start, time.perf_counter() - wall
        products = max(1, min(8, round(0.5 * passed / max(per_layer / 3e10, 1e-9))))
        began = cpu_seconds()
        for _ in range(products):
            loaded.multiply()
        multiplying = cpu_seconds() - began
        answer = {
            "cpu_seconds": round(passed, 4),
            "seconds": round(seconds, 4),
            "peak_gflops": per_layer * products / multiplying / 1e9,
            "all_cpu_seconds": cpu_seconds() - start,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
