"""Peak host memory of loading a mixture of experts, beside the bytes of its parameters.

    python -m experiments.benchmarks.load_experts [--dir DIR] [--layers 10] [--mesh fsdp=4]

A random Qwen3-MoE in bfloat16, a tensor for each matrix of each expert as on the hub, 2.1 billion parameters at ten
layers. It is written once to DIR, one tensor in memory at a time. Two processes are measured: one that loads, and one
that only starts the backend; the difference of their peaks is what loading needs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from experiments.benchmarks.measure import keep, run


def config_of(layers: int) -> dict[str, Any]:
    """64 experts of which 8 are taken."""
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }


def write_checkpoint(directory: Path, raw: dict[str, Any]) -> None:
    """Every tensor is cut from one pool of random numbers."""
    from ches_jax.errors import CheckpointError
    from ches_jax.hf.export import write_config, write_weights
    from ches_jax.models.decoder import abstract_parameters
    from ches_jax.models.families.registry import decoder_config, family_of
    from ches_jax.models.stacks import layers_of
    from ches_jax.runs.files import new_directory

    config = decoder_config(raw)
    shapes = {name: leaf.shape for name, leaf in abstract_parameters(config).items()}
    pool = (np.random.default_rng(0).standard_normal(1 << 26, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for rule in family_of(raw, "config").name_rules(shapes, config):
            shape = shapes[rule.param]
            for i, name in enumerate(rule.names(shape, layers_of(config, rule.param)).values()):
                size = int(np.prod(shape[rule.lead :]))
                start = (i * 9973) % (len(pool) - size)
                yield name, pool[start : start + size].reshape(shape[rule.lead :])

    with new_directory(directory, CheckpointError) as folder:
        write_weights(folder, tensors(), 2**29)
        write_config(folder, raw)


def load(directory: str, mesh: str | None) -> dict[str, Any]:
    """Load it, in a process of its own; an empty name loads nothing."""
    import jax

    from ches_jax.models.checkpoint.load import load_model
    from ches_jax.models.decoder import named_parameters

    jax.local_devices()
    if not directory:
        return {"parameters": 0, "bytes": 0}
    params = named_parameters(load_model(directory, mesh=mesh))
    jax.block_until_ready(params)
    return {"parameters": sum(p.size for p in params.values()), "bytes": sum(p.nbytes for p in params.values())}


def main() -> None:
    """Write, measure, keep."""
    if len(sys.argv) == 4 and sys.argv[1] == "load":
        print(json.dumps(load(sys.argv[2], sys.argv[3] or None)))
        return
    if len(sys.argv) == 4 and sys.argv[1] == "write":
        write_checkpoint(Path(sys.argv[2]), config_of(int(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "ches_jax_benchmark_experts")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--mesh")
    args = parser.parse_args()
    directory = args.dir.with_name(f"{args.dir.name}_{args.layers}")
    module = [sys.executable, "-m", "experiments.benchmarks.load_experts"]
    if not directory.exists():
        # a process of its own: a child's peak begins at the memory of the process that starts it
        subprocess.run([*module, "write", str(directory), str(args.layers)], check=True)
    devices = 1 if args.mesh is None else int(np.prod([int(part.split("=")[1]) for part in args.mesh.split(",")]))
    env = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    idle, loaded = (run([*module, "load", name, args.mesh or ""], env) for name in ("", str(directory)))
    stored = loaded["bytes"] / 2**20
    peak = loaded["peak_rss_mb"]
    needed = peak - idle["peak_rss_mb"]
    print(
        f"{loaded['parameters']:,} parameters, {stored:.0f} MB; peak {peak:.0f} MB ({peak / stored:.3f}x), "
        f"{needed:.0f} MB more than a process that loads nothing ({needed / stored:.3f}x)"
    )
    table = {"parameter_mb": stored, "peak_mb": peak, "peak_ratio": peak / stored, "needed_ratio": needed / stored}
    print(keep("load_experts", {"mesh": args.mesh, **table, "runs": [idle, loaded]}))


if __name__ == "__main__":
    main()
