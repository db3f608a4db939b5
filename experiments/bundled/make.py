"""Writes what ships in ``ches_jax/bundled``.

python -m experiments.bundled.make --seed 0 --stage data     seconds; the committed bytes
python -m experiments.bundled.make --seed 0 --stage model    minutes; trains and exports the model
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import ches_jax.bundled
from experiments.bundled.pairs import Row, preference_pairs, probe_prompts
from experiments.bundled.tokenizer import save_tokenizer, train_tokenizer
from experiments.bundled.world import build_world


@dataclass(frozen=True, kw_only=True)
class Make:
    """What to write, and where."""

    seed: int = 0
    """The seed of the world and of the training run."""
    stage: Literal["data", "model", "all"] = "all"
    """``data``: tokenizer, pairs and prompts. ``model``: training and export."""
    out: Path = Path(ches_jax.bundled.__file__).parent
    """The folder the artefacts are written to."""


def write_data(seed: int, out: Path) -> None:
    """Writes tokenizer, pairs and prompts; the same seed gives the same bytes."""
    world = build_world(seed)
    save_tokenizer(train_tokenizer(world), out / "model")
    _write_rows(out / "pairs.jsonl", preference_pairs(world))
    _write_rows(out / "prompts.jsonl", probe_prompts(world))


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(make: Make) -> None:
    """Runs the selected stages."""
    if make.stage in ("data", "all"):
        write_data(make.seed, make.out)
    if make.stage in ("model", "all"):
        from experiments.bundled.train import train_and_export

        train_and_export(make.seed, make.out / "model")
    print(make.out)


if __name__ == "__main__":
    main(tyro.cli(Make))
