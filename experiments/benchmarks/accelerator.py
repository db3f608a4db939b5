"""What benchmarks on the accelerator at hand share: the device, random models of known shapes, where results go."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import ROOT, keep, run

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
DTYPE = "bfloat16"


def write_model(size: str, tokenizer: Path, directory: Path) -> None:
    """A random model of the shape, weights N(0, 0.02^2) in bfloat16, with a tokenizer."""
    from flax import nnx

    from ches_jax.hf.export import copy_tokenizer
    from ches_jax.models.checkpoint.save import save_pretrained
    from ches_jax.models.decoder import Decoder
    from ches_jax.models.families.registry import decoder_config

    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "dtype": DTYPE,
        **SHAPES[size],
    }
    model = Decoder(decoder_config(raw), rngs=nnx.Rngs(0), param_dtype=DTYPE, dtype=DTYPE)
    save_pretrained(model, directory, config=raw)
    copy_tokenizer(tokenizer, directory)


def write_on_host(size: str, tokenizer: Path, directory: str) -> None:
    """``write_model`` in a process of its own that leaves the accelerator alone: it is random numbers and a file."""
    command = [sys.executable, "-m", "experiments.benchmarks.accelerator", size, str(tokenizer.resolve()), directory]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def device() -> dict[str, Any]:
    """Platform and device as jax sees them, asked in a process of its own: a device has one owner at a time."""
    code = "import jax, json; d = jax.devices()[0]; print(json.dumps({'platform': d.platform, 'kind': d.device_kind}))"
    return run([sys.executable, "-c", code])


def refuse(size: str, platform: str) -> None:
    """Only the tiny size on a CPU: the others would take hours, and mean nothing.

    Raises:
      SystemExit: the others.
    """
    if platform == "cpu" and size != "tiny":
        raise SystemExit(f"--size {size}: needs an accelerator, jax finds none here; --size tiny runs anywhere")


def device_for(sizes: Iterable[str]) -> dict[str, Any]:
    """The device, where it can run these sizes."""
    here = device()
    for size in sizes:
        refuse(size, here["platform"])
    return here


def keep_of(here: Mapping[str, Any], name: str, result: Mapping[str, Any]) -> None:
    """Keep a result under the name of the device that computed it; of a CPU none."""
    if here["platform"] != "cpu":
        print(keep(f"{name}_{here['kind'].replace(' ', '_').replace('/', '_')}", result))


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description="Write a random model.")
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    write_model(args.size, args.tokenizer, args.directory)


if __name__ == "__main__":
    main()
