"""Packed rows that share prompts give every sequence the states it has alone, whatever the layers of the family do.

Sinks join a softmax's total only; chunks and growing queries count a sequence's own positions; lent keys and values are
those of the row; experts see each token by itself.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import Decoder

from .packed import packed

SIZES = [(20, 3, 17, 9), (33, 0, 11, 40), (5, 2, 50, 7)]
"""Prompt, shared beginning, rest of chosen, rest of rejected: longer than the chunks and windows of the models."""
FAMILIES = (
    "cohere2", "deepseek_v3", "gemma4", "glm4", "gpt_oss", "granite", "lfm2", "llama4", "ministral3", "mixtral",
    "olmo3", "olmoe", "qwen3_5", "qwen3_moe", "smollm3",
)  # fmt: skip
TOLERANCE = {"gemma4": 2e-5, "qwen3_5": 1e-4}


@nnx.jit
def both(model: Decoder, row_arrays, ids, mask):
    tokens, positions, seen, lengths = row_arrays
    in_rows = model.hidden(tokens, positions, seen, lengths, attend=partial(blocks, block=32))
    return in_rows, model.hidden(ids, mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_in_a_row_is_the_sequence_alone(golden: Path, family: str):
    made = packed(SIZES, 160)
    shape = (len(made.sequences), max(len(at) for _, at in made.sequences))
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, (row, at) in enumerate(made.sequences):
        ids[i, : len(at)], mask[i, : len(at)] = made.rows.tokens[row][at], True
    arrays = (made.rows.tokens, made.rows.positions, made.seen, made.rows.lengths)
    in_rows, alone = (np.asarray(a) for a in both(load_model(golden / family / "policy"), arrays, ids, mask))
    worst = max(np.abs(in_rows[row][at] - alone[i, : len(at)]).max() for i, (row, at) in enumerate(made.sequences))
    assert worst < TOLERANCE.get(family, 5e-6) * np.abs(alone).max()
