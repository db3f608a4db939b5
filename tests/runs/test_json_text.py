"""JSON text of rows: the bytes that the library's encoder writes."""

import hashlib
import json
import random
from datetime import datetime

import numpy as np
import pytest

from ches_jax.data.sources import row_id
from ches_jax.runs.json_text import json_bytes, json_value, quoted

LETTERS = ["a", "é", "😀", '"', "\\", "\n", "\r", "\t", "\x00", "\x1f", "\x7f", "\u2028", "/", "<", " "]


def made_texts(count: int) -> list[str]:
    """Texts short and long, plain and full of what JSON escapes."""
    rng = random.Random(0)
    plain = ["word " * n for n in (0, 1, 19, 20, 100)]
    mixed = ["".join(rng.choices(LETTERS, k=rng.randrange(300))) for _ in range(count)]
    return plain + mixed + [text + "x" * 200 for text in mixed]


def test_a_text_is_quoted_as_the_encoder_of_the_library_does_it():
    for text in made_texts(200):
        assert quoted(text) == json.dumps(text, ensure_ascii=False).encode()


def test_a_row_is_the_line_that_the_encoder_of_the_library_writes():
    values = [*made_texts(20), 0, -7, 2**70, True, None, 1.5, -0.0, 1e22, [1, {"a": ["é"]}], {}, {"k": {"n": None}}]
    row = {f'key "{i}"': value for i, value in enumerate(values)}
    assert json_bytes(row) == (json.dumps(row, ensure_ascii=False) + "\n").encode()


def test_whatever_a_row_holds_is_a_line_of_json():
    row = {"when": datetime(2020, 1, 2), "bytes": b"x", "x": float("inf"), "text": "\ud800", "list": [float("nan")]}
    back = json.loads(json_bytes(row))
    assert back == {"when": "2020-01-02 00:00:00", "bytes": "b'x'", "x": None, "text": "\ud800", "list": [None]}


@pytest.mark.parametrize(
    "row", [{1: "a", "1": "b", None: "c"}, {"n": np.float64(0.5), "m": np.int64(3), "a": np.arange(2)}, {"t": (1, 2)}]
)
def test_other_keys_and_numbers_are_opened_as_values_are(row):
    assert json.loads(json_bytes(row)) == json_value(row)


def test_the_identity_of_texts_is_that_of_any_content():
    """A pair of texts takes a shorter way to the same hash."""
    for text in made_texts(50):
        content = {"prompt": text, "chosen": text[::-1], "rejected": "no"}
        written = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        assert row_id(content) == hashlib.sha256(written.encode()).hexdigest()[:32]
