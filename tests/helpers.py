"""What tests of several folders share."""

import json
import math
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ches_jax.models.decoder import Decoder

LENGTH = 512
"""Sequences are padded to this on the right, so that a model compiles once for all."""


def write_lines(path: Path, rows: Iterable[Any]) -> str:
    """A file of JSON lines, a row each; its path as the command line takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float = 400) -> tuple[list[int], list[str]]:
    """Exit codes and messages; nobody is left behind."""
    try:
        said = [p.communicate(timeout=seconds)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], said


@nnx.jit
def _hidden_and_log_probs(model: Decoder, tokens: Any, mask: Any) -> tuple[Any, Any]:
    hidden = model.hidden(tokens, mask=mask)[0]
    return hidden, jax.nn.log_softmax(model.logits(hidden), axis=-1)


def one_sequence(model: Decoder, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of a sequence alone, and the log-probabilities of the next token at each position, in float64."""
    tokens, mask = np.zeros((1, LENGTH), np.int32), np.zeros((1, LENGTH), bool)
    tokens[0, : len(ids)], mask[0, : len(ids)] = ids, True
    hidden, table = _hidden_and_log_probs(model, tokens, mask)
    return np.asarray(hidden[: len(ids)], np.float64), np.asarray(table[: len(ids)], np.float64)


def rounding_of_the_first_loss(logged: dict[str, float], beta: float = 0.1) -> float:
    """How far from ln 2 the loss of a policy that is the reference may be in float32.

    The loss is ln 2 - beta / 2 times a margin that is zero but for the rounding of four log-probabilities, each a sum
    of float32 numbers as large as itself: a few units in the last place of their sizes. (Two programs compute them, one
    for policy and one for reference, so they may round differently, and do on processors without AVX-512.)
    """
    sizes = 2 * (abs(logged["logps/chosen"]) + abs(logged["logps/rejected"]))
    return beta / 2 * 8 * float(np.finfo(np.float32).eps) * sizes


def starts_at_the_reference(logged: dict[str, float]) -> bool:
    """Whether the first logged loss is ln 2, as far as float32 can tell."""
    return abs(logged["loss"] - math.log(2)) <= rounding_of_the_first_loss(logged)
