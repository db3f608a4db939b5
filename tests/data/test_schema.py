"""What the columns of a data set mean: presets, declarations, recognition, and refusals of two readings."""

import json
from pathlib import Path

import pytest

from ches_jax.data.sources import open_pairs

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
