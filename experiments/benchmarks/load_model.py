"""Load a random checkpoint of 1.2 billion parameters: seconds and peak memory, beside transformers.

    python -m experiments.benchmarks.load_model [--dir DIR] [--dtype bfloat16] [--repeats 5]

The checkpoint is written once to DIR (default: a folder of the temporary directory) and read from the page cache after
the first, uncounted, run. Two times are reported: ``seconds`` of the load call alone, where transformers only maps the
file into memory and copies nothing, while stacked layers must be copied once; and ``process_seconds`` from the start of
the program to its end, imports included. The memory is the process's peak.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.benchmarks.measure import interleaved, keep, medians

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


def write_checkpoint(directory: Path, dtype: str) -> None:
    """Random weights, one tensor in memory at a time."""
    from ches_jax.errors import CheckpointError
    from ches_jax.hf.export import write_config, write_weights
    from ches_jax.models.decoder import abstract_parameters
    from ches_jax.models.families.registry import decoder_config, family_of
    from ches_jax.models.stacks import layers_of
    from ches_jax.runs.files import new_directory

    config = decoder_config(CONFIG)
    shapes = {name: leaf.shape for name, leaf in abstract_parameters(config).items()}
    rng = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for rule in family_of(CONFIG, "CONFIG").name_rules(shapes, config):
            shape = shapes[rule.param]
            for name in rule.names(shape, layers_of(config, rule.param)).values():
                values = rng.standard_normal(shape[rule.lead :], np.float32) * np.float32(0.02)
                yield name, values.astype(np.dtype(dtype))

    with new_directory(directory, CheckpointError) as folder:
        write_weights(folder, tensors(), 2**29)
        write_config(folder, {**CONFIG, "dtype": dtype})


def ours(directory: str) -> dict[str, float]:
    """``load_model``."""
    import jax

    from ches_jax.models.checkpoint.load import load_model
    from ches_jax.models.decoder import named_parameters

    jax.local_devices()  # the backend is up before the clock starts, as torch's is after its import
    started = time.perf_counter()
    params = named_parameters(load_model(directory))
    jax.block_until_ready(params)
    return {"seconds": time.perf_counter() - started, "parameters": sum(p.size for p in params.values())}


def theirs(directory: str) -> dict[str, float]:
    """``AutoModelForCausalLM.from_pretrained`` in the stored dtype."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401  (imported before the clock starts)

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    # a memory-mapped weight is not loaded before it is read
    total = sum(p.numel() for p in model.parameters())
    for p in model.parameters():
        p.data.view(-1)[:: 1024 // p.element_size()].sum()
    return {"seconds": time.perf_counter() - started, "parameters": total}


def main() -> None:
    """Interleave both and keep the table."""
    if len(sys.argv) == 3 and sys.argv[1] in {"ours", "transformers"}:
        print(json.dumps((ours if sys.argv[1] == "ours" else theirs)(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "ches_jax_benchmark_1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    directory = args.dir.with_name(f"{args.dir.name}_{args.dtype}")
    if not directory.exists():
        write_checkpoint(directory, args.dtype)
    module = [sys.executable, "-m", "experiments.benchmarks.load_model"]
    commands = {name: [*module, name, str(directory)] for name in ("ours", "transformers")}
    interleaved(commands, 1)
    runs = interleaved(commands, args.repeats)
    table = {name: medians(timings) for name, timings in runs.items()}
    ratios = {k: table["ours"][k] / table["transformers"][k] for k in ("seconds", "process_seconds", "peak_rss_mb")}
    for name, row in table.items():
        print(f"{name:<14}{row['seconds']:7.2f} s{row['process_seconds']:7.2f} s in all{row['peak_rss_mb']:10.0f} MB")
    print("ours / transformers:", {k: round(v, 3) for k, v in ratios.items()})
    print(keep(f"load_model_{args.dtype}", {"table": table, "ours_over_transformers": ratios, "runs": runs}))


if __name__ == "__main__":
    main()
