"""What a timed training step is given: its options, and pairs of random tokens of fixed lengths.

The standard library alone, for interpreters that have a peer and not the library.
"""

import argparse
import random


def step_parser(description: str | None) -> argparse.ArgumentParser:
    """Model and sizes of a step, as every timed trainer takes them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--response-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser


def random_pairs(count: int, prompt_len: int, response_len: int) -> list[dict[str, list[int]]]:
    """Rows of token ids; the same ones every time."""
    draw = random.Random(0)
    lengths = {"prompt_ids": prompt_len, "chosen_ids": response_len, "rejected_ids": response_len}
    return [{name: [draw.randrange(100, 1000) for _ in range(n)] for name, n in lengths.items()} for _ in range(count)]
