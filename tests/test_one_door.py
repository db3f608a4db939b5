"""Every error leaves the command by one door: a message and an exit code, no traceback, no commands to a terminal."""

import errno
import json

import pytest

from ches_jax import cli
from ches_jax.cli.commands import Merge, Outcome
from ches_jax.errors import ChesError, printable


def ends(monkeypatch, capsys, error):
    def run(self):
        raise error

    monkeypatch.setattr(Merge, "run", run)
    code = cli.main(["merge", "x"])
    output = capsys.readouterr()
    assert not output.out and "Traceback" not in output.err
    return code, output.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/s/x"), "ches: runs/s/x: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "ches: out: Permission denied\n"),
        (FileNotFoundError("gone"), "ches: gone\n"),
        (ChesError("bad \x1b[2J\u202e input"), "ches: bad \\x1b[2J\\u202e input\n"),
        (MemoryError(), "ches: out of memory (MemoryError); take smaller batches"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"), "ches: out of memory (RESOURCE"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "ches: I/O error: No space left"),
    ],
)
def test_what_the_user_can_mend_is_one_message(monkeypatch, capsys, error, message):
    code, said = ends(monkeypatch, capsys, error)
    assert code == 2 and said.startswith(message)


@pytest.mark.parametrize("error", [KeyError("rows"), RecursionError("deep"), ZeroDivisionError(), SystemError("x")])
def test_a_mistake_of_ours_is_two_lines_and_a_file(monkeypatch, capsys, error):
    code, said = ends(monkeypatch, capsys, error)
    first, second = said.splitlines()
    assert code == cli.INTERNAL_ERROR == 70 and type(error).__name__ in first
    kept = second.rpartition(" ")[2]
    with open(kept, encoding="utf-8") as file:
        assert "Traceback (most recent call last)" in file.read()


def test_text_of_files_reaches_the_terminal_escaped_and_json_as_json(monkeypatch, capsys):
    text = "name \x1b]0;owned\x07 \x9b2J \ud800 grün\n\tend"
    monkeypatch.setattr(Merge, "run", lambda self: Outcome(headline=text, text=text, details={"name": text}))
    assert cli.main(["merge", "x"]) == 0
    output = capsys.readouterr()
    for said in (output.out, output.err):
        assert not {"\x1b", "\x07", "\x9b"} & set(said) and "grün\n\tend" in said and "\\ud800" in said
    assert cli.main(["merge", "x", "--json"]) == 0
    said = capsys.readouterr().out
    assert said.isascii() and json.loads(said)["name"] == text


def test_letters_of_all_scripts_stay():
    text = "Grüße, 你好, سلام\u200cها, हिन्दी, 👩\u200d🔬"
    assert printable(text) == text
