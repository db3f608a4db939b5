"""Shapes of JSON: what does not fit is named by its place, and nothing else is."""

import pytest

from ches_jax.errors import RunError
from ches_jax.runs.shapes import misfit, read_json_lines, require_shape

SHAPE = {"name": str, "rate?": float, "counts?": {str: int}, "parts?": [{"on": bool}], "any?": object}
UNKNOWN = {"mean": (float, None)}


@pytest.mark.parametrize(
    "value",
    [
        {"name": "a"},
        {"name": "", "rate": None, "counts": {}, "parts": [], "more": object()},
        {"name": "a", "rate": 1, "counts": {"x": -(2**63)}, "parts": [{"on": False}], "any": [1]},
    ],
)
def test_what_fits(value):
    assert misfit(value, SHAPE) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the value is null; expected an object"),
        ([], "the value is a list; expected an object"),
        ({}, "name is missing"),
        ({"name": None}, "name is missing"),
        ({"name": 1}, "name is a number; expected text"),
        ({"name": "a", "rate": float("nan")}, "rate is a number; expected a finite number"),
        ({"name": "a", "rate": 10**400}, "rate is a number; expected a finite number"),
        ({"name": "a", "rate": True}, "rate is true or false; expected a finite number"),
        ({"name": "a", "counts": {"x": 2**63}}, "counts.x is a number; expected a whole number"),
        ({"name": "a", "counts": {"x": 1.0}}, "counts.x is a number; expected a whole number"),
        ({"name": "a", "counts": {"x": None}}, "counts.x is null; expected a whole number"),
        ({"name": "a", "parts": {}}, "parts is an object; expected a list"),
        ({"name": "a", "parts": [{"on": True}, {"on": 1}]}, "parts[1].on is a number; expected true or false"),
    ],
)
def test_what_does_not(value, message, tmp_path):
    assert misfit(value, SHAPE) == message
    with pytest.raises(RunError) as caught:
        require_shape(tmp_path / "run.json", value, SHAPE, RunError)
    assert str(caught.value).startswith(str(tmp_path / "run.json")) and str(caught.value).endswith(message)


def test_what_is_not_known_is_null_and_what_is_missing_is_damage():
    assert misfit({"mean": None}, UNKNOWN) is misfit({"mean": 1.5}, UNKNOWN) is misfit([None], [(float, None)]) is None
    assert misfit({}, UNKNOWN) == "mean is missing"
    assert misfit({"mean": "x"}, UNKNOWN) == "mean is text; expected a finite number"


def test_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}\n')
    assert read_json_lines(path, {"n": int}, RunError) == [{"n": 1}, {"n": 2}]
    for line, message in (
        ('{"n": "x"}', "n is text"),
        ("[1]", "is a list"),
        ("{", "not valid JSON"),
        ("[" * 99999, "JSON"),
    ):
        path.write_text('{"n": 1}\n' + line)
        with pytest.raises(RunError, match=rf"rows.jsonl, line 2: .*{message}"):
            read_json_lines(path, {"n": int}, RunError)
    path.write_bytes(b"\xff")
    with pytest.raises(RunError, match="is no text in UTF-8"):
        read_json_lines(path, {}, RunError)
