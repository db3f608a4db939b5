"""``docs/tests.md`` tells where each file is tested: every file is in the table, and what the table names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tests.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `((?:ches_jax|theory|experiments)/\S+\.py)` \| (.+) \|$", PAGE, re.MULTILINE))


def files(*folders: str, pattern: str = "*.py") -> set[str]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob(pattern))
    return {path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"}


def test_every_source_file_has_its_row_and_no_row_is_of_a_file_that_is_gone():
    assert set(ROWS) == files("ches_jax", "theory", "experiments")


def test_every_file_of_tests_is_named_and_every_one_named_exists():
    named = set(re.findall(r"`(tests/\S+\.py)`", PAGE))
    assert not {name for name in named if not (ROOT / name).is_file()}
    assert not files("tests", pattern="test_*.py") - named


def test_every_file_of_the_library_and_of_the_theory_is_tested():
    assert not [file for file, where in ROWS.items() if "`tests/" not in where and not file.startswith("experiments/")]
