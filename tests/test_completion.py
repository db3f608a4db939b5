"""Shell completion, asked of a real bash."""

import shutil
import subprocess

import pytest

from ches_jax.cli.commands import COMMANDS
from ches_jax.cli.completion import SHELLS, script


def completed(tmp_path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    source = tmp_path / "completion.sh"
    source.write_text(script("bash", COMMANDS), encoding="utf-8")
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f"source {source}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _ches; echo ${{COMPREPLY[*]}}"
    return subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("ches", "sc"), ["score"]),
        (("ches", "score", "--mo"), ["--model"]),
        (("ches", "score", "--eos", ""), ["include", "exclude", "given"]),
        (("ches", "score", "--eos", "ex"), ["exclude"]),
        (("ches", "score", "--eos", "--mo"), ["--model"]),
        (("ches", "score", "--pairs", "x"), []),  # files: bash's own
    ],
    ids=lambda case: " ".join(case),
)
def test_bash_offers_verbs_options_and_closed_lists(tmp_path, words, offered):
    assert completed(tmp_path, *words) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_every_verb_and_option_is_in_the_script(shell):
    text = script(shell, COMMANDS)
    assert all(verb in text for verb in COMMANDS)
    assert "on-bad-row" in text
