"""Numbers where precision and range end, against float64: long responses, wide states, large vocabularies, extremes.

What is fast is the same at a size that costs nothing; the sizes of real models are slow tests.
"""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import ChesError
from ches_jax.hf.tensors import open_tensors
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.checkpoint.save import save_pretrained
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import decoder_config
from ches_jax.models.logprobs import Head, token_logps
from ches_jax.scores.forward import ForwardPass, Outputs
from ches_jax.scores.hidden_sums import segment_statistics
from ches_jax.scores.scorer import Batching, PairScorer
from ches_jax.types import Response, TokenPair
from tests.helpers import one_sequence

EPS = float(np.finfo(np.float32).eps)
DTYPES = ["float32", "bfloat16", "float16"]


def sized(fast, slow):
    return [fast, pytest.param(slow, marks=pytest.mark.slow)]


def float64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", sized(128, 4096))
def test_ches_of_a_thousand_wide_states(width, dtype):
    """Sums are of 60,000 and more, at the end of float16's range; they are kept in float32, whatever the states are."""
    tokens, rng = 1000, np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(60, 20, (1, 2 * tokens, width)), dtype)
    at = jnp.arange(2 * tokens, dtype=jnp.int32)[None]
    segment = at // tokens
    statistics = segment_statistics(hidden, at, at, segment, jnp.array([[tokens - 1, 2 * tokens - 1]], jnp.int32))
    plus, minus = np.asarray(statistics.sums[0], np.float64)
    expected = float64(hidden)[0].reshape(2, tokens, width).sum(1)
    np.testing.assert_allclose([plus, minus], expected, rtol=16 * EPS)
    truth = (expected[0] @ expected[1] - expected[0] @ expected[0]) / (expected[0] @ expected[0])
    assert abs((plus @ minus - plus @ plus) / (plus @ plus) - truth) < 32 * EPS


def logps_in_float64(hidden, weight, target):
    z = float64(hidden)[0] @ float64(weight.astype(hidden.dtype)).T
    top = z.max(-1)
    total = top + np.log(np.exp(z - top[:, None]).sum(-1))
    return z[np.arange(len(z)), np.asarray(target[0])] - total, np.abs(z).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", sized(4096, 262_144))
def test_log_probabilities_over_a_large_vocabulary(vocabulary, dtype):
    rng, width, count = np.random.default_rng(1), 64, 3
    hidden = jnp.asarray(rng.normal(size=(1, count, width)), dtype)
    weight = jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)
    target = jnp.asarray([[0, vocabulary // 2, vocabulary - 1]], jnp.int32)
    expected, largest = logps_in_float64(hidden, weight, target)
    found = np.asarray(token_logps(hidden, weight, target, Head(chunk=2)), np.float64)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=16 * EPS * (largest + np.log(vocabulary)))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0, 1e4])
def test_extreme_logits_have_finite_log_probabilities(scale):
    """Logits of up to 40,000, or all alike: the likeliest token's logarithm is not above 0, and none is lost."""
    rng = np.random.default_rng(2)
    hidden = jnp.asarray(rng.normal(size=(1, 4, 8)) * scale, jnp.float32)
    weight = jnp.asarray(rng.normal(size=(31, 8)), jnp.float32)
    likeliest = jnp.argmax(hidden @ weight.T, axis=-1).astype(jnp.int32)
    rarest = jnp.argmin(hidden @ weight.T, axis=-1).astype(jnp.int32)
    for target in (likeliest, rarest):
        expected, largest = logps_in_float64(hidden, weight, target)
        found = np.asarray(token_logps(hidden, weight, target, Head()), np.float64)[0]
        assert (found <= 0).all()
        np.testing.assert_allclose(found, expected, rtol=8 * EPS, atol=16 * EPS * (largest + 4))


@pytest.mark.parametrize("tokens", sized(512, 8192))
def test_the_log_probability_of_a_long_response_is_a_sum_without_drift(tokens):
    logp = -np.abs(np.random.default_rng(3).normal(2, 3, tokens)).astype(np.float32)
    at = jnp.arange(tokens, dtype=jnp.int32)[None]
    nothing, one = jnp.zeros((1, tokens, 1)), jnp.zeros((1, tokens), jnp.int32)
    statistics = segment_statistics(
        nothing, at, at, one, jnp.zeros((1, 1), jnp.int32), lambda hidden, target: jnp.asarray(logp)[None]
    )
    assert statistics.logps is not None
    assert float(statistics.logps[0, 0]) == pytest.approx(logp.astype(np.float64).sum(), rel=32 * EPS)


def long_model(positions, dtype):
    raw = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": positions,
    }  # fmt: skip
    config = replace(decoder_config(raw))
    model = Decoder(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda w: (w * 4 if w.ndim > 1 else w).astype(dtype), nnx.state(model)))
    return model


def pair_of(row_id, index, prompt, chosen, rejected):
    sides = [Response(tuple(map(int, ids)), 2) for ids in (chosen, rejected)]
    return TokenPair(row_id=row_id, index=index, prompt=tuple(map(int, prompt)), chosen=sides[0], rejected=sides[1])


def scored(model, pairs, row_tokens):
    run = ForwardPass(model, make_mesh("data=1"), Outputs(logps=True))
    return PairScorer(run, Batching.of(row_tokens, row_tokens, run, None), "include")(pairs)[0]


@pytest.mark.slow
def test_a_response_of_8192_tokens():
    """The whole pass in float32 against the same in float64: attention, sums, logarithms."""
    rng = np.random.default_rng(4)
    ids = rng.integers(3, 64, 8192 + 100)
    pair = pair_of("a", 0, ids[:20], ids[20:8212], ids[8212:])
    columns = []
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            columns.append(scored(long_model(8448, dtype), [pair], 8448))
    truth, found = columns
    for name in ("inner", "sqnorm_chosen", "sqnorm_rejected"):
        assert found[name][0] == pytest.approx(truth[name][0], rel=2e-5, abs=2e-5 * truth["sqnorm_chosen"][0]), name
    for name in ("logp_chosen", "logp_rejected"):
        assert found[name][0] == pytest.approx(truth[name][0], rel=2e-6), name


def test_one_number_that_is_none_names_its_row_and_no_other():
    """One token's embedding is NaN; it is in one response of one pair among others of its batch."""
    model = long_model(64, "float32")
    table = model.embed_tokens.weight
    table[...] = table[...].at[50].set(jnp.nan)
    sides = [((10, 11), (12,)), ((13,), (14, 50, 15)), ((16, 17), (18,))]
    pairs = [pair_of(f"r{i}", i, (5, 6), *both) for i, both in enumerate(sides)]
    with pytest.raises(ChesError, match=r"row 1 \(row_id r1\).*not finite") as error:
        scored(model, pairs, 64)
    assert "r0" not in str(error.value) and "r2" not in str(error.value)


def test_weights_of_a_float16_file_are_its_numbers(tiny_model, tmp_path):
    """They are kept as they are stored, and what is computed with them is float32."""
    raw = json.loads((tiny_model / "config.json").read_text())
    model = load_model(tiny_model, dtype="float32")
    nnx.update(model, jax.tree.map(lambda w: w.astype(jnp.float16), nnx.state(model)))
    save_pretrained(model, tmp_path / "half", config=raw | {"torch_dtype": "float16"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / "half" / name)
    assert {tensor.dtype for tensor in open_tensors(tmp_path / "half").values()} == {"float16"}
    whole = nnx.state(load_model(tiny_model, dtype="float32"))
    half, wide = (load_model(tmp_path / "half", dtype="float32", param_dtype=kept) for kept in (None, "float32"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(nnx.state(half)), strict=True):
        assert b.dtype == jnp.float16
        np.testing.assert_array_equal(np.asarray(a).astype(np.float16), np.asarray(b))
    for a, b in zip(one_sequence(half, [5, 9, 300]), one_sequence(wide, [5, 9, 300]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * EPS * np.abs(b).max())
