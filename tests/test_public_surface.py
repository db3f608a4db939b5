"""The names of ``import ches_jax as cj``: pinned, each with a docstring whose example the suite runs."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest

import ches_jax as cj

VERBS = [
    "score",
    "select",
    "train",
    "forecast",
    "influence",
    "groups",
    "diagnose",
    "generate",
    "judge",
    "label",
    "report",
    "doctor",
    "convert",
    "verify",
]
CONFIGS = [f"{verb.capitalize()}Config" for verb in VERBS if verb not in ("report", "verify")]
MATHEMATICS = ["pair_statistics", "ches", "ln_ches", "head_score", "displacement_summary", "get_loss", "incentives"]
OTHERS = ["load_model", "load_tokenizer", "score_pairs", "LossInputs", "bundled", "ChesError", "__version__"]


def test_the_names_are_these():
    """A name that goes or comes is a change for users: it belongs into the changelog."""
    assert sorted(cj.__all__) == sorted([*VERBS, *CONFIGS, *MATHEMATICS, *OTHERS])
    assert set(cj.__all__) <= set(dir(cj))


@pytest.mark.parametrize("name", [*VERBS, *CONFIGS, *MATHEMATICS, *OTHERS[:-1]])
def test_every_name_has_a_docstring_with_an_example(name):
    """The examples themselves are run as doctests of their modules."""
    value = getattr(cj, name)
    # a verb's package is called as the verb
    documented = value if not hasattr(value, name) else getattr(value, name)
    assert ">>> " in (documented.__doc__ or "")


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("report", "verify")])
def test_a_verb_that_gets_no_config_says_which_it_takes(verb):
    with pytest.raises(cj.ChesError, match=rf"ches_jax.{verb}: expected a {verb.capitalize()}Config, got 'trl-out'"):
        getattr(cj, verb)("trl-out")


ORDER = (".. math::", "Args:", "Returns:", "Yields:", "Raises:", "References:", ">>> ")
EQUATIONS = {*MATHEMATICS} - {"get_loss"}
SOURCES = {"pair_statistics", "ches", "ln_ches", "head_score", "displacement_summary"}


@pytest.mark.parametrize("name", [*VERBS, *MATHEMATICS, "load_model", "load_tokenizer", "score_pairs"])
def test_a_docstring_has_what_applies_in_the_order_of_contributing(name):
    value = getattr(cj, name)
    function = value if not hasattr(value, name) else getattr(value, name)
    text = inspect.getdoc(function) or ""
    places = {part: text.index(part) for part in ORDER if part in text}
    assert list(places) == sorted(places, key=places.__getitem__)
    applies = (
        {">>> "} | ({".. math::"} if name in EQUATIONS else set()) | ({"References:"} if name in SOURCES else set())
    )
    if name not in MATHEMATICS:  # a function of numbers alone refuses nothing
        applies |= {"Args:", "Raises:"}
        parameters = [p for p in inspect.signature(function).parameters if p != "hyper"]
        assert [p for p in parameters if not re.search(rf"^ +{p}: ", text, re.MULTILINE)] == []
    assert applies <= set(places)


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert cj.__version__ == project["project"]["version"]
