"""A verb that computes says what it does, and nothing of other libraries' reaches standard error."""

import json
import subprocess
import sys

import pytest

from ches_jax.train import loop

SMALL = ("--limit", "4")
VERBS = {
    "score": [*SMALL],
    "generate": [*SMALL, "--max-new-tokens", "2", "--batch-size", "4"],
    "judge": ["--responses", "RESPONSES", "--by", "model", "--judge", "bundled", "--max-new-tokens", "2"],
    "train": [*SMALL, "--batch-size", "4", "--steps", "1", "--mesh", "data=1", "--probes", "none"],
}


def said(tmp_path, verb, *words):
    responses = tmp_path / "responses.jsonl"
    responses.write_text(json.dumps({"prompt": "How?", "text": "I cannot help."}) + "\n")
    options = [str(responses) if word == "RESPONSES" else word for word in VERBS[verb]]
    command = [sys.executable, "-m", "ches_jax", verb, *options, "--out", str(tmp_path / "out"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_no_line_of_other_libraries_reaches_standard_error(tmp_path, verb):
    assert said(tmp_path, verb, "--quiet") == ""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["score", "generate", "train"])
def test_long_steps_are_named_in_their_order(tmp_path, verb):
    steps = [line for line in said(tmp_path, verb).splitlines() if line.startswith("ches: ")]
    loading, compiling = (
        next(i for i, line in enumerate(steps) if word in line) for word in ("loading the model", "compiling")
    )
    assert loading < compiling


def test_training_says_what_it_is_doing(tmp_path, monkeypatch, capsys):
    class Halt(Exception):
        pass

    def halt(*args):
        raise Halt

    monkeypatch.setattr(loop, "assemble", lambda *args: None)
    monkeypatch.setattr(loop, "_train", halt)
    config = loop.TrainConfig(limit=4, batch_size=4, steps=1, mesh="data=1", probes="none", out=str(tmp_path / "run"))
    with pytest.raises(Halt):
        loop.train(config)
    first, loss, second = capsys.readouterr().err.splitlines()
    assert loss == "ches: the loss: dpo(beta=0.1)"
    assert first.startswith("ches: loading the model (") and second == "ches: compiling, then training"
