"""Layers with a state: what a token gets depends on its own sequence alone, wherever that is in the row."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.models.attention.mask import Visibility, key_ranges
from ches_jax.models.decoder import Decoder, layer_by_layer
from ches_jax.models.delta_rule import Inputs, gated_delta_rule
from ches_jax.models.families.registry import decoder_config
from ches_jax.models.short_conv import before

from .packed import packed
from .test_strict import family

HEADS, KEYS, VALUES = 2, 3, 5
LAYOUTS: dict[str, list[list[tuple[int, int, int]]]] = {
    "one_sequence": [[(0, 0, 0)] * 23],
    "pairs": [
        [(0, 0, 0)] * 4 + [(0, 4, 4)] * 3 + [(0, 4, 7)] * 2 + [(9, 9, 9)] * 1 + [(9, 10, 10)] * 6 + [(9, 10, 16)] * 7,
        [(0, 0, 0)] * 9 + [(0, 9, 9)] * 1 + [(0, 9, 10)] * 5 + [(15, 15, 15)] * 8,
    ],
    "many_responses": [
        [(0, 0, 0)] * 5 + [(0, 5, 5)] * 6 + [(0, 5, 11)] * 2 + [(0, 5, 13)] * 5 + [(0, 5, 18)] * 5,
    ],
    "left_padding": [[(i, i, i) for i in range(7)] + [(7, 7, 7)] * 16],
}
"""Per row and token: context start, context end, own start."""


def seen(layout: str) -> Visibility:
    columns = np.array(LAYOUTS[layout], np.int32).transpose(2, 0, 1)
    return Visibility(*map(jnp.asarray, columns))


def ancestors(seen: Visibility, row: int, token: int) -> list[int]:
    """The tokens of the sequence up to ``token``, in order."""
    start, end, own = (int(np.asarray(a)[row, token]) for a in seen)
    return [*range(start, end), *range(own, token + 1)]


rule = jax.jit(gated_delta_rule, static_argnames="chunk")


def inputs(rows: int, length: int) -> Inputs:
    rng = np.random.default_rng(0)
    k = rng.normal(size=(rows, length, HEADS, KEYS))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q, v = rng.normal(size=k.shape), rng.normal(size=(rows, length, HEADS, VALUES))
    g, beta = -rng.uniform(0, 2, (rows, length, HEADS)), rng.uniform(0, 1, (rows, length, HEADS))
    return Inputs(*map(jnp.asarray, (q, k, v, g, beta)))


def recurrence(x: Any, row: int, tokens: list[int]) -> tuple[Any, Any]:
    """The state and the output after the last of ``tokens``, one token after the other."""
    state = np.zeros((HEADS, KEYS, VALUES))
    out = np.zeros((HEADS, VALUES))
    for t in tokens:
        q, k, v, g, beta = (np.asarray(a)[row, t] for a in x)
        state = np.exp(g)[:, None, None] * state
        u = beta[:, None] * (v - np.einsum("nkv,nk->nv", state, k))
        state = state + k[:, :, None] * u[:, None, :]
        out = np.einsum("nkv,nk->nv", state, q)
    return state, out


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rule_in_chunks_is_the_recurrence_along_each_sequence(layout: str):
    visible = seen(layout)
    rows, length = visible.own_start.shape
    x = inputs(rows, length)
    expected = np.array([[recurrence(x, r, ancestors(visible, r, t))[1] for t in range(length)] for r in range(rows)])
    last = np.array([recurrence(x, r, ancestors(visible, r, length - 1))[0] for r in range(rows)])
    for chunk in (4, 64):
        out, state = rule(x, key_ranges(visible), None, chunk=chunk)
        np.testing.assert_allclose(out, expected, atol=1e-13, err_msg=str(chunk))
        np.testing.assert_allclose(state, last, atol=1e-13, err_msg=str(chunk))


@pytest.mark.usefixtures("x64")
def test_the_rule_goes_on_from_a_state():
    visible = key_ranges(seen("left_padding"))
    x = inputs(*visible.own_start.shape)
    whole, last = rule(x, visible, None)
    part = [type(a)(*(b[:, :15] for b in a)) for a in (x, visible)]
    rest = [type(a)(*(b[:, 15:] for b in a)) for a in (x, visible)]
    first, state = rule(part[0], part[1], None, chunk=4)
    second, end = rule(rest[0], rest[1], state, chunk=3)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-13)
    np.testing.assert_allclose(end, last, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_the_rule_is_that_of_the_sequences_alone():
    visible = seen("pairs")
    x = inputs(2, 23)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=x.v.shape))

    @partial(jax.jit, static_argnums=1)
    def loss(x: Inputs, chunk: int) -> Any:
        return (gated_delta_rule(x, key_ranges(visible), None, chunk)[0] * weights).sum()

    slopes = jax.jit(jax.grad(loss), static_argnums=1)
    by_chunks, by_tokens = slopes(x, 4), slopes(x, 1)
    for a, b in zip(by_chunks, by_tokens, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    step = 1e-6
    for name in Inputs._fields:  # a direction for each input, by differences
        way = jnp.asarray(np.random.default_rng(2).normal(size=getattr(x, name).shape))
        up, down = (x._replace(**{name: getattr(x, name) + s * step * way}) for s in (1, -1))
        slope = (loss(up, 4) - loss(down, 4)) / (2 * step)
        np.testing.assert_allclose(np.vdot(getattr(by_chunks, name), way), slope, rtol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("places", [0, 1, 3])
def test_the_token_so_many_places_before(layout: str, places: int):
    visible = seen(layout)
    rows, length = visible.own_start.shape
    numbers = np.arange(1.0, rows * length + 1, dtype=np.float32).reshape(rows, length, 1)
    x = jnp.asarray(numbers)
    actual = np.asarray(jax.jit(before, static_argnums=2)(x, key_ranges(visible), places))[..., 0]
    for row in range(rows):
        for token in range(length):
            line = ancestors(visible, row, token)
            expected = numbers[row, line[-1 - places], 0] if len(line) > places else 0.0
            assert actual[row, token] == expected, (row, token)


TINY = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_multiple_of": 8},
    "qwen3_5_text": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 3,
    },
}


def decoder(kind: str, vocabulary: int) -> Decoder:
    model = Decoder(
        decoder_config(family(kind, **TINY[kind], vocab_size=vocabulary, max_position_embeddings=128)),
        rngs=nnx.Rngs(0),
        param_dtype="float64",
        dtype="float64",
    )
    rng = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.4), state))
    return model


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", TINY)
def test_packed_rows_give_the_states_of_each_sequence_alone(kind: str):
    sizes = [(5, 2, 4, 3), (1, 0, 2, 6), (3, 1, 1, 1)]
    rows = packed(sizes, 40)
    model = decoder(kind, 64)
    hidden = nnx.jit(lambda m, *args: m.hidden(*args))
    batch = rows.rows
    together = np.asarray(hidden(model, jnp.asarray(batch.tokens), jnp.asarray(batch.positions), rows.seen))
    alone = nnx.jit(lambda m, tokens, mask: m.hidden(tokens, mask=mask))
    for row, where in rows.sequences:
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(where)] = batch.tokens[row][where]
        expected = np.asarray(alone(model, jnp.asarray(tokens), np.arange(16)[None] < len(where)))
        np.testing.assert_allclose(together[row][where], expected[0, : len(where)], atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", TINY)
def test_a_text_made_token_by_token_has_the_states_of_the_whole(kind: str, apart: bool):
    model = decoder(kind, 64)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 64, (3, 12)), jnp.int32)
    first = jnp.array([0, 3, 8], jnp.int32)  # the last prompt is shorter than a convolution reaches
    mask = jnp.arange(12, dtype=jnp.int32)[None] >= first[:, None]
    whole = nnx.jit(lambda m, t: m.hidden(t, mask=mask))(model, tokens)
    states, kept = nnx.jit(lambda m, t: m.prefill(t, first, 12))(model, tokens[:, :9])
    layers = nnx.jit(Decoder.layers_apart)(model) if apart else None
    kept = layer_by_layer(model.config, kept) if apart else kept
    step = nnx.jit(lambda m, t, kept, slot, layers: m.extend(t, kept, slot, first, apart=layers))
    made = [states]
    for slot, n in ((9, 1), (10, 2)):
        states, kept = step(model, tokens[:, slot : slot + n], kept, jnp.int32(slot), layers)
        made.append(states)
    for row, start in enumerate(first.tolist()):
        np.testing.assert_allclose(jnp.concatenate(made, 1)[row, start:], whole[row, start:], atol=1e-12)
