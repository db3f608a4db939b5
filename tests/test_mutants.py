"""The list of mistakes (``tools/mutants.toml``): each can still be made, and a test caught it."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("mutants_tool", ROOT / "tools" / "mutants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["mutants_tool"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_mistake_can_be_made_and_its_tests_are_there(tool):
    mutants, tests = tool.mutants()
    problems = []
    for mutant in mutants:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        try:
            compile(mutant.made_in(text), mutant.file, "exec")
        except (ValueError, SyntaxError) as error:
            problems.append(str(error))
    assert not problems
    assert {m.area for m in mutants} == tests.keys()
    named = [name.partition("::")[0] for names in (*tests.values(), *(m.tests for m in mutants)) for name in names]
    assert not [name for name in named if not (ROOT / name).exists()]
    assert len({(m.file, m.old, m.new) for m in mutants}) == len(mutants) == len({m.name for m in mutants})


def test_nearly_every_mistake_that_was_tried_was_noticed(tool):
    """By a test that is there; what survives is argued in the list."""
    (mutants, _), found = tool.mutants(), tool.found()
    unnoticed = [m for m in mutants if found.get(m.name) == tool.SURVIVES]
    assert not [m.name for m in unnoticed if not m.argued]
    assert len(unnoticed) * 20 <= len(found)
    assert not [
        test for test in found.values() if test != tool.SURVIVES and not (ROOT / test.partition("::")[0]).exists()
    ]
