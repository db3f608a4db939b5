"""What the columns of a data set mean: presets, declarations, recognition, and refusals of two readings."""

import json
import re
from pathlib import Path

import pytest

from ches_jax.data.schema.presets import PRESETS
from ches_jax.data.sources import open_pairs
from ches_jax.errors import DataError

SCHEMAS = Path(__file__).parents[2] / "../shared/schemas"
EXPECTED = json.loads((SCHEMAS / "expected.json").read_text("utf-8")) if SCHEMAS.exists() else {}


def read(value):
    """(system text, last user text) of a prompt, or the text of a response."""
    if isinstance(value, str):
        return None, value.rpartition("Human: ")[2].removesuffix("Assistant:").removesuffix("Assistant: ").strip()
    system = [m["content"] for m in value if m["role"] == "system"]
    user = [m["content"] for m in value if m["role"] == "user"]
    return (system or [None])[0], user[-1]


def said(value):
    return value.strip() if isinstance(value, str) else value[-1]["content"]


def pairs_of(source):
    return [
        {
            "row": r.index,
            "prompt": read(r.content["prompt"])[1],
            "system": read(r.content["prompt"])[0],
            "chosen": said(r.content["chosen"]),
            "rejected": said(r.content["rejected"]),
        }
        for r in source
        if r.candidates != ()
    ]


@pytest.mark.skipif(not SCHEMAS.exists(), reason="the shared schemas are not beside this checkout")
@pytest.mark.parametrize("name", [n for n in EXPECTED if n != "kto_rows"])
def test_public_shapes_are_read_as_a_careful_reader_would(name):
    assert pairs_of(open_pairs(str(SCHEMAS / f"{name}.jsonl"))) == EXPECTED[name]["pairs"]


def test_the_page_names_every_preset_and_its_declaration_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs/data.md").read_text("utf-8")
    for name, preset in PRESETS.items():
        assert f"| `{name}` | `{preset.schema.describe()}` | {preset.sets} |" in page
    (tmp_path / "post.toml").write_text(re.findall(r"```toml\n(.*?)```", page, re.S)[0])
    (tmp_path / "a.jsonl").write_text('{"post": "p", "answer_a": "a", "answer_b": "b", "label": "B"}\n')
    (words,) = re.findall(r"`--columns (prompt=post .*?)`", page)
    columns = dict(word.split("=") for word in words.split())
    path = str(tmp_path / "a.jsonl")
    for source in (open_pairs(path, schema=str(tmp_path / "post.toml")), open_pairs(path, columns=columns)):
        (row,) = source
        assert row.content == {"prompt": "p", "chosen": "b", "rejected": "a"}


TWO = {"response_a": "2", "response_b": "3"}
UNCLEAR = {
    "0 and 1 beside letters": ([{"prompt": "p", **TWO, "label": i} for i in (0, 1)], "'label' 0 means"),
    "a sign": ([{"prompt": "p", **TWO, "preference": v} for v in (-1.5, 2.0)], "a negative 'preference' means"),
    "two prompts": (
        [{"question": "p", "instruction": "other", "chosen": "a", "rejected": "b"}],
        "prompt is in 'question'",
    ),
    "rank or score": (
        [{"prompt": "p", "answers": ["a", "b"], "rank_score": [0.5, 0.25]}],
        "'rank_score' is a rank",
    ),
    "where counting begins": ([{"prompt": "p", "answers": ["a", "b"], "best": 1}], "counts the responses from 0"),
}


@pytest.mark.parametrize(("rows", "message"), UNCLEAR.values(), ids=UNCLEAR)
def test_two_readings_are_refused_with_both(tmp_path, rows, message):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=f"two readings: .*{message}.*; choose with --columns"):
        open_pairs(str(tmp_path / "a.jsonl"))
