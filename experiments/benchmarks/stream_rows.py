"""Does memory stay flat as the number of pairs grows? Peak memory of ``ches score`` on synthetic pairs.

    python -m experiments.benchmarks.stream_rows [--rows 10000 100000 1000000]

Every row is a pair of one-token answers to a short question of its own, scored by a random two-layer model of width 16
with the bundled tokenizer: the work of a pair is next to nothing, so what is left is reading, tokenising, packing and
writing.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from ches_jax import bundled
from experiments.benchmarks.measure import keep, run


def write_pairs(path: Path, rows: int) -> None:
    """Rows that all differ."""
    with path.open("w", encoding="utf-8") as f:
        for i in range(rows):
            row = {"prompt": f"<|user|> Is {i} odd?<|assistant|>", "chosen": " Yes", "rejected": " No"}
            f.write(json.dumps(row) + "\n")


def write_model(directory: Path) -> None:
    """A random model next to nothing, with the bundled tokenizer."""
    from flax import nnx

    from ches_jax.hf.export import copy_tokenizer
    from ches_jax.models.checkpoint.save import save_pretrained
    from ches_jax.models.decoder import Decoder
    from ches_jax.models.families.registry import decoder_config

    raw = {
        "model_type": "llama",
        "vocab_size": 1280,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }
    save_pretrained(Decoder(decoder_config(raw), rngs=nnx.Rngs(0)), directory, config=raw)
    copy_tokenizer(bundled.model_dir(), directory)


def main() -> None:
    """One run for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    write_model(folder / "model")
    table = {}
    for rows in args.rows:
        pairs, out = folder / "pairs.jsonl", folder / "run"
        write_pairs(pairs, rows)
        words = ["--model", str(folder / "model"), "--pairs", str(pairs), "--out", str(out), "--on-bad-row", "keep"]
        record = run([sys.executable, "-m", "ches_jax", "score", *words, "--quiet", "--json"])
        table[rows] = {
            "peak_rss_mb": record["peak_rss_mb"],
            "pairs_per_second": record["pairs_per_second"],
            "rows": record["counts"]["rows"],
            "process_seconds": record["process_seconds"],
        }
        print(f"{rows:>9} rows  {record['peak_rss_mb']:7.0f} MB  {record['pairs_per_second']:8.0f} pairs/s")
        shutil.rmtree(out)
    print(keep("stream_rows", {"table": table}))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
