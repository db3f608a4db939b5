"""Packed rows that share prompts give every sequence the states it has alone, whatever the layers of the family do.

Sinks join a softmax's total only; chunks and growing queries count a sequence's own positions; lent keys and values are
those of the row; a state continues from the prompt's; experts see each token by itself. In float64, where no mistake
hides behind rounding.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import decoder_config

from .packed import packed
from .rows import ROWS, Row

SIZES = [(9, 3, 7, 5), (13, 0, 6, 16), (5, 2, 20, 7)]
"""Prompt, shared beginning, rest of chosen, rest of rejected: longer than the chunks and windows of the models."""
LENGTH, VOCABULARY, LONGEST = 96, 128, 32
ROOM = {"gpt2": {"n_positions": 64}, "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY}}


@nnx.jit
def both(model: Decoder, row_arrays, ids, mask):
    tokens, positions, seen, lengths = row_arrays
    in_rows = model.hidden(tokens, positions, seen, lengths, attend=partial(blocks, block=32))
    return in_rows, model.hidden(ids, mask=mask)


def random_model(row: Row) -> Decoder:
    raw = {"model_type": row.family, **row.base, "vocab_size": VOCABULARY, **ROOM.get(row.family, {})}
    model = Decoder(decoder_config(raw), rngs=nnx.Rngs(0), param_dtype="float64", dtype="float64")
    rng = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * a.shape[-1] ** -0.5), state))
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", [pytest.param(row, id=row.family) for row in ROWS])
def test_a_sequence_in_a_row_is_the_sequence_alone(row: Row):
    model = random_model(row)
    for order in (SIZES, SIZES[::-1]):
        made = packed(order, LENGTH)
        shape = (len(made.sequences), LONGEST)
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, (place, at) in enumerate(made.sequences):
            ids[i, : len(at)], mask[i, : len(at)] = made.rows.tokens[place][at], True
        arrays = (made.rows.tokens, made.rows.positions, made.seen, made.rows.lengths)
        in_rows, alone = (np.asarray(a) for a in both(model, arrays, ids, mask))
        for i, (place, at) in enumerate(made.sequences):
            error = np.abs(in_rows[place][at] - alone[i, : len(at)]).max()
            assert error < 1e-12 * np.abs(alone).max(), (order, i)
