"""What the documentation tells people to type: commands parse, Python runs, notebooks run and are whole."""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ches_jax.cli import _parsed
from ches_jax.cli.commands import COMMANDS
from ches_jax.cli.options import options_of
from ches_jax.cli.suggest import corrected

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for folder in (".", "docs", "theory", "experiments") for p in (ROOT / folder).glob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
COMMAND = re.compile(r"^(?:    |\$ |)(ches [a-z].*)$", re.MULTILINE)
INLINE = re.compile(r"`(ches [a-z][^`\n]*)`")
ABRIDGED = re.compile(r"\.\.\.|\[options\]|VERB|^ches \w+ *$")
"""Commands that are named, not typed: with dots, with a word that stands for many, without anything behind the verb."""


def commands_of(text: str) -> list[str]:
    """The commands in a page's code blocks."""
    typed = [line.partition("  #")[0].partition("   ")[0] for line in COMMAND.findall(text.replace("\\\n", " "))]
    return [line.strip() for line in typed if not ABRIDGED.search(line.strip())]


def parsed(line: str) -> None:
    """Read a command as the command line does; nothing is run."""
    words = shlex.split(re.sub(r"\b(N|STEP)\b", "1", line), comments=True)[1:]
    words = words[: next((i for i, word in enumerate(words) if word in ("|", ">")), None)]
    _parsed(words[0], COMMANDS[words[0]], corrected(words[0], COMMANDS[words[0]], words[1:]))


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: p.name)
def test_every_command_of_a_page_is_one(page):
    for line in commands_of(page.read_text(encoding="utf-8")):
        parsed(line)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: p.name)
def test_every_option_that_a_sentence_names_is_there(page):
    for line in INLINE.findall(page.read_text(encoding="utf-8")):
        verb, *words = line.split()[1:]
        if verb in COMMANDS:  # "ches VERB" otherwise
            known = {flag for option in options_of(verb, COMMANDS[verb]) for flag in option.flags} | {"--help"}
            assert {w.partition("=")[0] for w in words if w.startswith("--")} <= known, line


def test_the_commands_are_found():
    """A pattern that misses them would let everything pass."""
    counts = {page.relative_to(ROOT).as_posix(): len(commands_of(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert counts["README.md"] >= 3 and counts["theory/README.md"] >= 3 and counts["docs/train.md"] >= 4, counts
    assert commands_of("    ches score --pairs D   # words\n`ches train --lr 1`\n    ches train ...") == [
        "ches score --pairs D"
    ]


@contextlib.contextmanager
def session_of_a_reader() -> Iterator[None]:
    """jax as it is outside the tests, which are stricter; what a page changes is changed back."""
    import jax

    as_it_is = jax.enable_x64(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    with as_it_is, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_enable_x64", os.environ.get("JAX_ENABLE_X64", "0") in ("1", "true", "True"))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=pytest.mark.slow if p.parent.name == "theory" else ())
        for p in PAGES
        if p.parent.name in ("docs", "theory")
    ],
    ids=lambda p: p.name,
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with session_of_a_reader():
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            exec(compile(block, page.name, "exec"), names)


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_kept_with_what_it_printed(path):
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run tools/notebooks.py"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    assert str(ROOT) not in path.read_text(encoding="utf-8"), "a path of this machine"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, monkeypatch):
    """All cells in one namespace, as a kernel would. Three take 5 to 25 CPU seconds and are not slow: CI runs all."""
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(path.parent)
    names: dict[str, object] = {}
    with session_of_a_reader():
        for number, cell in enumerate(code_of(path)):
            exec(compile(cell, f"{path.stem}[{number}]", "exec"), names)


def test_every_page_and_notebook_is_in_the_contents_of_the_site():
    """A page that nobody links is a page that nobody reads; what is made from the code is listed in the hook."""
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+\.(?:md|ipynb)", contents.partition("\nnav:")[2]))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").glob("*.md")}
    assert pages | {f"notebooks/{p.name}" for p in NOTEBOOKS} <= named
