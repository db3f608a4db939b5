"""The recipe learns through the library's trainer and exports; the shipped model has learned."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

import ches_jax.bundled
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import named_parameters
from ches_jax.runs.directory import read_json
from experiments.bundled import lexicon as lex
from experiments.bundled.train import HF_CONFIG, Recipe, export, train
from experiments.bundled.world import build_world, dialogues, prompt_text


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(ches_jax.bundled.model_dir() / "tokenizer.json"))


@pytest.mark.slow
def test_a_few_steps_train_and_export_a_model_that_loads(tokenizer, tmp_path):
    short = Recipe(steps=3, dialogues=8, warmup=1)
    trained = train(0, ches_jax.bundled.model_dir(), tmp_path, short, quiet=True)
    run = read_json(tmp_path / "run" / "run.json")
    assert run["loss"].startswith("sft") and run["counts"]["train"] == 24 and run["counts"]["updates"] == 3
    # the first update sees eight of the dialogues and a model that knows nothing
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert first["loss"] == pytest.approx(np.log(HF_CONFIG["vocab_size"]), abs=0.1)
    rows = [json.loads(line) for line in (tmp_path / "dialogues.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": d.prompt, "completion": d.response} for d in dialogues(build_world(0), 24)]
    out = tmp_path / "out"
    out.mkdir()
    export(trained, out)
    before, again = load_model(trained), load_model(out)
    for name, value in named_parameters(before).items():
        np.testing.assert_array_equal(named_parameters(again)[name], value.astype(jnp.bfloat16))
    assert again.config == before.config
    for name in ("config.json", "generation_config.json"):
        assert read_json(out / name) == read_json(ches_jax.bundled.model_dir() / name), name


def test_the_shipped_model_answers_held_out_statements(tokenizer):
    model = load_model(ches_jax.bundled.model_dir())
    said = build_world(0).held_out.statements[:24]
    prompts = [tokenizer.encode(prompt_text(lex.STATEMENT_QUESTIONS[0].format(statement=s.text))).ids for s in said]
    tokens = np.zeros((len(prompts), 40), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    hidden = model.hidden(jnp.asarray(tokens), mask=jnp.asarray(tokens > 0))
    last = np.array([len(ids) - 1 for ids in prompts])
    top = model.logits(hidden[np.arange(len(prompts)), last]).argmax(-1).tolist()
    for token, statement in zip(top, said, strict=True):
        assert tokenizer.decode([token]).strip() in lex.ANSWERS[statement.stance], statement
