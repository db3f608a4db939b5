"""A run is what it opened: a file that changed is named when the run is resumed."""

import json
import shutil
from types import SimpleNamespace

import pytest

from ches_jax import bundled
from ches_jax.errors import RunError
from ches_jax.generate.config import GenerateConfig
from ches_jax.generate.run import generate
from ches_jax.judges.config import JudgeConfig
from ches_jax.judges.judge_prompt import default_question
from ches_jax.judges.phrases import default_rules
from ches_jax.judges.run import judge
from ches_jax.runs import directory
from ches_jax.runs.directory import open_run
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.run import score
from ches_jax.train.config import TrainConfig
from ches_jax.train.loop import train

ROW = {"prompt": "Hi", "chosen": " yes", "rejected": " no", "text": " yes", "refusal": False}


class Halt(Exception):
    """Everything is open, nothing is computed."""


def halt(*args, **options):
    raise Halt


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What the runs read, and verbs that stop before they compute."""
    shutil.copytree(bundled.model_dir(), tmp_path / "model")
    shutil.copytree(bundled.model_dir(), tmp_path / "other")
    for name in ("data.jsonl", "held_out.jsonl", "labels.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROW) + "\n")
    shutil.copy(default_rules(), tmp_path / "rules.txt")
    shutil.copy(default_question(), tmp_path / "question.txt")
    loaded = SimpleNamespace(config=SimpleNamespace(family="llama"))
    monkeypatch.setattr("ches_jax.models.checkpoint.load.load_model", lambda *args, **options: loaded)
    monkeypatch.setattr("ches_jax.scores.run.pair_scorer", halt)
    monkeypatch.setattr("ches_jax.generate.run.Generator", halt)
    monkeypatch.setattr("ches_jax.judges.run._judge_chunks", halt)
    monkeypatch.setattr("ches_jax.train.loop.assemble", halt)
    return tmp_path


def run(verb, folder, **options):
    model, data, out = str(folder / "model"), str(folder / "data.jsonl"), str(folder / "out")
    verbs = {
        "score": lambda: score(ScoreConfig(model=model, pairs=data, out=out), **options),
        "generate": lambda: generate(GenerateConfig(model=model, prompts=data, out=out), **options),
        "judge": lambda: judge(
            JudgeConfig(by="model", judge=model, judge_template=str(folder / "question.txt"), responses=data, out=out),
            **options,
        ),
        "judge by rules": lambda: judge(
            JudgeConfig(rules=str(folder / "rules.txt"), responses=data, out=out), **options
        ),
        "judge by labels": lambda: judge(
            JudgeConfig(by="labels", labels=str(folder / "labels.jsonl"), responses=data, out=out), **options
        ),
        "train": lambda: train(
            TrainConfig(
                model=model,
                pairs=data,
                out=out,
                reference=str(folder / "other"),
                eval_pairs=str(folder / "held_out.jsonl"),
                probes=data,
                mesh="data=1",
            ),
            **options,
        ),
    }
    with pytest.raises(Halt):
        verbs[verb]()


def other_content(path):
    """Another file that reads as the same kind."""
    if path.suffix == ".safetensors":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        return bytes(content)
    return path.read_bytes() + b"\n"


MODEL = [f"model/{path.name}" for path in sorted(bundled.model_dir().iterdir())]
READ = {
    "score": [*MODEL, "data.jsonl"],
    "generate": [*MODEL, "data.jsonl"],
    "judge": [*MODEL, "data.jsonl", "question.txt"],
    "judge by rules": ["data.jsonl", "rules.txt"],
    "judge by labels": ["data.jsonl", "labels.jsonl"],
    "train": [*MODEL, *(name.replace("model", "other", 1) for name in MODEL), "data.jsonl", "held_out.jsonl"],
}


@pytest.mark.parametrize("verb", READ)
def test_any_file_that_a_run_opened_is_named_when_it_is_another_one_now(files, verb):
    run(verb, files)
    for name in READ[verb]:
        path = files / name
        before = path.read_bytes()
        path.write_bytes(other_content(path))
        words = f"another run.*, {path.name}: sha256 [0-9a-f]{{12}} there, sha256 [0-9a-f]{{12}} now"
        with pytest.raises(RunError, match=f"(?s){words}"):
            run(verb, files, resume=True)
        path.write_bytes(before)
    run(verb, files, resume=True)


def test_a_file_that_was_not_there_counts_too(files):
    run("generate", files)
    (files / "model" / "special_tokens_map.json").write_text("{}")
    with pytest.raises(RunError, match=r"special_tokens_map.json: no such file there, sha256 [0-9a-f]{12} now"):
        run("generate", files, resume=True)


def test_an_option_that_differs_is_named_alone(files):
    run("score", files)
    config = ScoreConfig(model=str(files / "model"), pairs=str(files / "data.jsonl"), out=str(files / "out"))
    with pytest.raises(RunError, match=r"--out: limit: None there, 7 now$"):
        score(ScoreConfig(**{**config.__dict__, "limit": 7}), resume=True)


def test_other_versions_are_reported_before_any_work_and_can_be_accepted(tmp_path, monkeypatch):
    open_run(tmp_path / "run", "score", {"config": {}}, resume=False)
    monkeypatch.setattr(directory, "versions", lambda: {"python": "3", "jax": "9.9"})
    with pytest.raises(RunError, match=r"(?s)begun with other versions.*jax: .* there, '9.9' now.*--other-versions"):
        open_run(tmp_path / "run", "score", {"config": {}}, resume=True)
    began = open_run(tmp_path / "run", "score", {"config": {}}, resume=True, other_versions=True)
    directory.write_summary(tmp_path / "run", {})
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["versions"]["jax"] == "9.9" and record["versions_at_start"] == began["versions"]
