"""What a timed training step is given: its options, and pairs of random tokens, of the same lengths in every update.

The standard library alone, for interpreters that have a peer and not the library.
"""

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def step_parser(description: str | None) -> argparse.ArgumentParser:
    """Model and sizes of a step, as every timed trainer takes them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--response-len", type=int, default=256)
    parser.add_argument("--lengths", help="JSON list of [prompt, chosen, rejected] of an update's pairs instead")
    parser.add_argument("--lora-rank", type=int, help="adapters of this rank on all linear layers, alpha twice that")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser


def step_options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options of a command as ``measure`` of a trainer takes them: the pairs' lengths as ``batch``."""
    options = vars(parser.parse_args())
    options["batch"] = pair_lengths(*(options.pop(n) for n in ("pairs", "prompt_len", "response_len", "lengths")))
    return options


def pair_lengths(pairs: int, prompt_len: int, response_len: int, lengths: str | None = None) -> list[list[int]]:
    """Tokens of prompt, chosen and rejected of each pair of an update.

    >>> pair_lengths(2, 5, 3)
    [[5, 3, 3], [5, 3, 3]]
    """
    if lengths is not None:
        return json.loads(Path(lengths).read_text(encoding="utf-8"))
    return [[prompt_len, response_len, response_len]] * pairs


def step_times(seconds: Sequence[float], cpu: Sequence[float], steps: int) -> dict[str, Any]:
    """Of a first step and ``steps`` others, in order: what a step takes, and what the first one does.

    Raises:
      SystemExit: another number of steps was made.

    >>> step_times([9.0, 2.0, 4.0], [8.0, 1.0, 3.0], 2)["cpu_s_per_step_median"]
    2.0
    """
    if len(seconds) != steps + 1:
        raise SystemExit(f"{len(seconds)} updates were made, expected {steps + 1}")
    return {
        "s_per_step_median": statistics.median(seconds[1:]),
        "cpu_s_per_step_median": statistics.median(cpu[1:]),
        "first_step_s": seconds[0],
        "first_step_cpu_s": cpu[0],
        "steps": steps,
    }


def with_reference(rows: Sequence[Mapping[str, list[int]]]) -> list[dict[str, Any]]:
    """The rows with log-probabilities of a reference, as TRL and EasyDeL name them: minus ten nats a token.

    >>> with_reference([{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}])[0]["ref_chosen_logps"]
    -20.0
    """
    return [
        {**row, **{f"ref_{side}_logps": -10.0 * len(row[f"{side}_ids"]) for side in ("chosen", "rejected")}}
        for row in rows
    ]


def random_pairs(lengths: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    """Rows of token ids of these lengths; the same ones every time."""
    draw = random.Random(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: [draw.randrange(100, 1000) for _ in range(n)] for name, n in zip(names, row, strict=True)}
        for row in lengths
    ]
