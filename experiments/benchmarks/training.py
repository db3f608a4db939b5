"""One training run of ours in a process of its own, as the benchmarks time it: prints one JSON line.

python -m experiments.benchmarks.training MODEL_DIR [--pairs 4 --prompt-len 256 --response-len 256 --steps 5]
    [--lengths FILE --lora-rank 8 --dtype float32 --trace DIR]

The first step is timed by itself, with its compilation, which no cache on the disk shortens.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ches_jax.hugepages import with_large_pages
from experiments.benchmarks.costs import top_costs
from experiments.benchmarks.fixed_lengths import random_pairs, step_options, step_parser, step_times
from experiments.benchmarks.measure import usage
from experiments.benchmarks.scoring import matmul_peak


def measure(
    model: str,
    batch: Sequence[Sequence[int]],
    *,
    steps: int,
    lora_rank: int | None = None,
    dtype: str = "float32",
    trace: str | None = None,
) -> dict[str, Any]:
    """Run ``ches train`` for ``steps`` updates after a first one, with a clock around its step.

    Each update has the same pairs, of the lengths in ``batch`` (prompt, chosen, rejected): an epoch is a batch.
    With ``trace`` one more update is profiled into that directory, and what cost most of it is named.
    """
    import jax

    from ches_jax.runs.directory import device_name
    from ches_jax.train import TrainConfig, assemble, train

    seconds, cpu = [], []

    class Timed(assemble.Step):
        def __call__(self, *args: Any, **options: Any) -> Any:
            last = len(seconds) == steps + 1
            with jax.profiler.trace(trace) if trace and last else contextlib.nullcontext():
                wall, used = time.perf_counter(), time.process_time()
                result = super().__call__(*args, **options)  # its metrics are on the host: the step is over
                seconds.append(time.perf_counter() - wall)
                cpu.append(time.process_time() - used)
            return result

    plain = assemble.Step
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in random_pairs(batch)), encoding="utf-8")
        config = TrainConfig(
            model=model,
            pairs=str(file),
            out=f"{folder}/run",
            optimizer="adamw",
            lr=1e-6,
            batch_size=len(batch),
            epochs=steps + 1 + (trace is not None),
            watch=len(batch),
            lora_rank=lora_rank,
            mesh="data=1",
            on_bad_row="keep",
            export=False,
            dtype=dtype,
        )
        try:
            assemble.Step = Timed  # type: ignore[misc]
            with contextlib.redirect_stdout(sys.stderr):
                train(config, quiet=True)
        finally:
            assemble.Step = plain  # type: ignore[misc]
    return {
        **step_times(seconds[: steps + 1], cpu[: steps + 1], steps),
        "peak_rss_mib": usage()["peak_rss_mb"],
        "needed_gflop": needed_gflop(model, batch, adapters=lora_rank is not None),
        "matmul_peak_gflops": matmul_peak(dtype),
        "dtype": dtype,
        "platform": jax.default_backend(),
        "device": device_name(),
        **({"top_costs": top_costs(Path(trace))} if trace else {}),
    }


def needed_gflop(model: str, lengths: Sequence[Sequence[int]], *, adapters: bool = False) -> float:
    r"""What the matrix products of a step need at least, in GFLOP, attention left out.

    .. math:: k \, \sum_i [ N_{layers} (p_i + c_i + r_i) + (c_i + r_i) \, |W| ]

    with p tokens of prompt of a pair, once, c and r of its responses; N weights of the layers' matrices, W the
    unembedding, which only states that predict a response are multiplied by; k = 6: 2 for a multiplication and an
    addition, times 3 for the two directions of the gradient. With ``adapters`` 4: the gradient of the weights is not
    wanted; their own products are not counted. Nor is what is computed again.
    """
    from ches_jax.hf.directory import read_config
    from ches_jax.models.decoder import abstract_parameters
    from ches_jax.models.families.registry import decoder_config

    config = decoder_config(read_config(Path(model)))
    shapes = abstract_parameters(config).items()
    layers = sum(s.size for name, s in shapes if name.startswith("layers.") and s.ndim == 3)
    unembedding = config.vocab_size * config.width
    responses = sum(chosen + rejected for _, chosen, rejected in lengths)
    prompts = sum(prompt for prompt, _, _ in lengths)
    return (4e-9 if adapters else 6e-9) * (layers * (prompts + responses) + responses * unembedding)


def main() -> None:
    """One run, in the pages that ``ches`` runs in."""
    with_large_pages()
    parser = step_parser(__doc__)
    parser.add_argument("--trace", help="profile one more update into this directory")
    print(json.dumps(measure(**step_options(parser))))


if __name__ == "__main__":
    main()
