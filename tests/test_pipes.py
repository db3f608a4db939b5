"""A pipe, a device, a loop or a folder in the place of a file: nothing waits, nothing is read for ever."""

import os
import signal

import pytest

from ches_jax.cli import main
from ches_jax.data.file_tokenizer import _template
from ches_jax.errors import ChesError
from ches_jax.report.provenance import read_record
from ches_jax.report.training_page import _losses
from ches_jax.runs.chunks import read_lines
from ches_jax.runs.shapes import read_json_lines
from ches_jax.train.metrics import JsonLines
from ches_jax.train.saved_here import require_regular

KINDS = {
    "pipe": os.mkfifo,
    "device": lambda path: os.symlink("/dev/zero", path),
    "loop": lambda path: os.symlink(path, path),
    "folder": os.mkdir,
}


@pytest.fixture(autouse=True)
def deadline():
    """What waits after all is an error of this test, and no end of the suite."""

    def late(*_):
        raise AssertionError("still waiting")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("p.jsonl", "doctor --pairs {}"),
        ("p.csv", "doctor --pairs {}"),
        ("p.parquet", "doctor --pairs {}"),
        ("p.jsonl.gz", "judge --responses {} --out out"),
        ("s.toml", "doctor --schema {}"),
        ("s.json", "doctor --schema {}"),
        ("r.toml", "recipe {} --out out"),
        ("log.jsonl", "diagnose {}"),
        ("t.jinja", "score --template {} --out out"),
    ],
)
def test_of_a_command(tmp_path, monkeypatch, capsys, kind, name, words):
    monkeypatch.chdir(tmp_path)
    KINDS[kind](tmp_path / name)
    assert main(words.format(name).split()) == 2
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("run.json", lambda path: read_record(path.parent)),
        ("metrics.jsonl", lambda path: _losses(path.parent)),
        ("metrics.jsonl", lambda path: JsonLines(path, 1)),
        ("responses.jsonl", lambda path: list(read_lines(path))),
        ("predictions.jsonl", lambda path: read_json_lines(path, {}, ChesError)),
        ("chat_template.jinja", lambda path: _template(path.parent, {})),
        ("_METADATA", lambda path: require_regular(path.parent)),
    ],
)
def test_of_a_directory(tmp_path, kind, name, read):
    """It is refused, or as good as not there."""
    KINDS[kind](tmp_path / name)
    try:
        read(tmp_path / name)
    except (ChesError, OSError) as error:
        assert name in str(error)


def test_a_pipe_of_data_says_what_to_do(tmp_path, capsys):
    os.mkfifo(tmp_path / "p.jsonl")
    assert main(["doctor", "--pairs", str(tmp_path / "p.jsonl")]) == 2
    assert "write them to a file first" in capsys.readouterr().err
