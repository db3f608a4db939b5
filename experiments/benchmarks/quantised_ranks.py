"""What quantised weights do to the ranks of CHES and of the head score: Spearman against the unquantised model.

    python -m experiments.benchmarks.quantised_ranks --model ../shared/models/hh-tiny/bf16 \
        --pairs ../shared/data/hh_harmless_base_test.jsonl [--limit 1000]

The matrices of the layers are rounded to the nearest value that each format has (no calibration data), the model is
written in that format and scored as any other. Beside the rank correlation over pairs: how many of the tenth of pairs
with the highest score stay in it, which is what a filter removes.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from ches_jax.hf.quantised.bitsandbytes import NF4
from experiments.benchmarks.measure import keep

Parts = dict[str, np.ndarray]
COLUMNS = ("ches", "ln_ches", "head_score")


def nf4(weight: np.ndarray) -> Parts:
    """Blocks of 64 by their largest magnitude, the nearest of sixteen values each."""
    blocks = weight.reshape(-1, 64)
    largest = np.abs(blocks).max(1)
    codes = np.abs(blocks[..., None] / largest[:, None, None] - NF4).argmin(-1).reshape(-1).astype(np.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        "weight": ((codes[::2] << 4) | codes[1::2])[:, None],
        "weight.absmax": largest,
        "weight.quant_map": NF4,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def int8(weight: np.ndarray) -> Parts:
    """Rows by their largest magnitude."""
    largest = np.abs(weight).max(1)
    return {"weight": np.rint(weight / largest[:, None] * 127).astype(np.int8), "SCB": largest}


def fp8(weight: np.ndarray) -> Parts:
    """Blocks of 32 x 32, scaled to the largest number of e4m3 (448)."""
    height, width = weight.shape
    grid = weight.reshape(height // 32, 32, width // 32, 32)
    scale = (np.abs(grid).max((1, 3)) / 448).astype(np.float32)
    q = (grid / scale[:, None, :, None]).reshape(weight.shape).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": q, "weight_scale_inv": scale}


def int4(weight: np.ndarray) -> Parts:
    """Groups of 32 inputs, sixteen whole numbers each, as compressed-tensors packs them."""
    height, width = weight.shape
    groups = weight.reshape(height, -1, 32)
    scale = (np.abs(groups).max(-1) / 7.5).astype(ml_dtypes.bfloat16)
    q = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -8, 7).astype(np.int64).reshape(height, -1, 8)
    packed = ((q + 8).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1).astype(np.uint32)
    return {"weight_packed": packed.view(np.int32), "weight_scale": scale, "weight_shape": np.array([height, width])}


FORMATS: dict[str, tuple[Callable[[np.ndarray], Parts], dict[str, Any]]] = {
    "bitsandbytes nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8, blocks of 32x32": (fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "int4, groups of 32": (
        int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "all": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
            },
        },
    ),
}


def write(model: Path, out: Path, quantise: Callable[[np.ndarray], Parts], settings: dict[str, Any]) -> None:
    """The model with the matrices of its layers in another format."""
    from ches_jax.hf.export import copy_tokenizer, write_config

    tensors: Parts = {}
    for name, value in load_file(model / "model.safetensors").items():
        if ".layers." in name and name.endswith("_proj.weight"):
            parts = quantise(value.astype(np.float32))
            tensors |= {f"{name.removesuffix('.weight')}.{part}": array for part, array in parts.items()}
        else:
            tensors[name] = value
    out.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, out / "model.safetensors")
    write_config(out, json.loads((model / "config.json").read_text()) | {"quantization_config": settings})
    copy_tokenizer(model, out)


def scores(model: Path, pairs: str, limit: int, out: Path) -> dict[str, np.ndarray]:
    """The score columns of a run."""
    import pyarrow.parquet as pq

    from ches_jax.scores.config import ScoreConfig
    from ches_jax.scores.run import score

    run = score(
        ScoreConfig(
            model=str(model), pairs=pairs, limit=limit, by="head_score", on_bad_row="keep", out=str(out), max_length=256
        ),
        quiet=True,
    )
    table = pq.read_table(run / "scores.parquet", columns=list(COLUMNS))
    return {name: table[name].to_numpy() for name in COLUMNS}


def compared(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Rank correlation, and the share of the highest tenth that stays there."""
    from scipy.stats import spearmanr

    known = np.isfinite(before) & np.isfinite(after)
    before, after = before[known], after[known]
    tenth = len(before) // 10
    highest = [set(np.argsort(a)[-tenth:].tolist()) for a in (before, after)]
    return {
        "spearman": float(spearmanr(before, after)[0]),  # type: ignore[arg-type]
        "highest_tenth_kept": len(highest[0] & highest[1]) / tenth,
        "pairs": len(before),
    }


def main() -> None:
    """Write, score, compare, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--limit", type=int, default=1000)
    args = parser.parse_args()
    table: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = scores(args.model, args.pairs, args.limit, Path(folder) / "plain")
        for name, (quantise, settings) in FORMATS.items():
            directory = Path(folder) / name.replace(" ", "_").replace(",", "")
            write(args.model, directory, quantise, settings)
            after = scores(directory, args.pairs, args.limit, Path(f"{directory}_run"))
            table[name] = {column: compared(plain[column], after[column]) for column in COLUMNS}
            for column, row in table[name].items():
                print(f"{name:<22}{column:<12}{row['spearman']:8.4f}{row['highest_tenth_kept']:8.1%}", flush=True)
    print(keep("quantised_ranks", {"model": str(args.model), "pairs": str(args.pairs), "table": table}))


if __name__ == "__main__":
    main()
