"""Packing keeps dialogues apart, and the recipe learns and exports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

import ches_jax.embedded
from ches_jax.models.decoder import Decoder, named_parameters
from ches_jax.models.families import decoder_config
from ches_jax.models.load import load_model
from ches_jax.models.visibility import Visibility
from experiments.embedded import lexicon as lex
from experiments.embedded.packing import Document, batches, documents, pack
from experiments.embedded.train import HF_CONFIG, Recipe, decays, export, response_loss, train
from experiments.embedded.world import build_world, dialogues, prompt_text

SMALL = {**HF_CONFIG, "hidden_size": 16, "head_dim": 4, "intermediate_size": 24}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(ches_jax.embedded.model_dir() / "tokenizer.json"))


@pytest.fixture(scope="module")
def small():
    return Decoder(decoder_config({**SMALL, "num_hidden_layers": 2}), rngs=nnx.Rngs(0))


def test_rows_line_up():
    rows = pack([[Document((1, 3, 4, 9, 2), 3), Document((1, 4, 8, 2), 2)]], length=10)
    assert rows.tokens.tolist() == [[1, 3, 4, 9, 2, 1, 4, 8, 2, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]]
    assert rows.start.tolist() == [[0, 0, 0, 0, 0, 5, 5, 5, 5, 9]]
    assert rows.learned.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1, 0, 0]]


def test_a_document_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="5 tokens, in rows of 4"):
        list(batches([Document((1, 3, 4, 9, 2), 3)], rows=1, length=4))


def test_packed_states_equal_those_of_a_dialogue_alone(tokenizer, small):
    docs = list(documents(dialogues(build_world(0), 3), tokenizer))
    rows = pack([docs], length=sum(len(d.ids) for d in docs) + 3)
    start = jnp.asarray(rows.start)
    seen = Visibility(jnp.zeros_like(start), jnp.zeros_like(start), start)
    packed = small.hidden(jnp.asarray(rows.tokens), jnp.asarray(rows.positions), seen)[0]
    at = 0
    for doc in docs:
        alone = small.hidden(jnp.asarray([doc.ids]))[0]
        np.testing.assert_allclose(packed[at : at + len(doc.ids)], alone, atol=1e-5)
        at += len(doc.ids)


def test_the_loss_is_that_of_the_responses(tokenizer, small):
    (doc,) = documents(dialogues(build_world(0), 1), tokenizer)
    logits = small.logits(small.hidden(jnp.asarray([doc.ids])))[0]
    logp = jax.nn.log_softmax(logits)
    response = range(doc.prompt, len(doc.ids))
    expected = -sum(float(logp[i - 1, doc.ids[i]]) for i in response) / len(response)
    padded = pack([[doc]], length=len(doc.ids) + 5)
    assert float(response_loss(small, padded)) == pytest.approx(expected, rel=1e-5)


def test_norms_do_not_decay(small):
    params = nnx.state(small, nnx.Param)
    mask = {".".join(map(str, p)): leaf.get_value() for p, leaf in nnx.to_flat_state(decays(params))}
    assert set(mask) == set(named_parameters(small))
    assert {name for name, decay in mask.items() if not decay} == {
        "norm.weight", "layers.attn_norm.weight", "layers.mlp_norm.weight"
    }  # fmt: skip


def test_a_few_steps_train_and_export_a_model_that_loads(tokenizer, tmp_path):
    short = Recipe(steps=3, rows=2, warmup=1)
    with jax.numpy_dtype_promotion("standard"):  # optax's AdamW mixes integers and floats
        model = train(0, tokenizer, short)
    export(model, tmp_path)
    again = load_model(tmp_path)
    for name, value in named_parameters(model).items():
        np.testing.assert_array_equal(named_parameters(again)[name], value.astype(jnp.bfloat16))
    assert again.config == model.config


def test_the_shipped_model_answers_held_out_statements(tokenizer):
    model = load_model(ches_jax.embedded.model_dir())
    said = build_world(0).held_out.statements[:24]
    asked = [prompt_text(lex.STATEMENT_QUESTIONS[0].format(statement=s.text)) for s in said]
    docs = [Document(tuple(tokenizer.encode(text).ids), 0) for text in asked]
    rows = pack([[doc] for doc in docs], length=40)
    last = np.array([len(doc.ids) - 1 for doc in docs])
    hidden = model.hidden(jnp.asarray(rows.tokens), mask=jnp.asarray(rows.tokens > 0))
    top = model.logits(hidden[np.arange(len(docs)), last]).argmax(-1).tolist()
    for token, statement in zip(top, said, strict=True):
        assert tokenizer.decode([token]).strip() in lex.ANSWERS[statement.stance], statement
