"""Rewards of tokens by contrast, against the log-probabilities of the sequences written out."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from ches_jax import bundled
from ches_jax.data.sources import open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
from ches_jax.errors import ChesError
from ches_jax.label.config import LabelConfig
from ches_jax.label.run import label
from ches_jax.models.checkpoint.load import load_model
from tests.helpers import one_sequence, write_lines


def test_rewards_are_those_of_the_two_sequences(tmp_path, tiny_model):
    rows = [record.content for record, _ in zip(open_pairs(str(bundled.pairs_file())), range(3), strict=False)]
    two = {"chosen_prompt": rows[0]["prompt"], "rejected_prompt": rows[1]["prompt"]}
    rows[2] = {**two, "chosen": rows[0]["chosen"], "rejected": rows[1]["rejected"]}
    options: Any = {"better": "Be good.\n{prompt}", "worse": "Be bad.\n{prompt}", "dtype": "float64"}
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    record = label(
        LabelConfig(by="contrast", model=str(tiny_model), pairs=pairs, out=str(tmp_path / "out"), **options), quiet=True
    )
    assert record["counts"] == {"rows": 3, "labelled": 3, "unsure": 0} and record["mean_probability"] is None
    written = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    tokenizer = PairTokenizer(load_tokenizer("bundled"), max_length=512)
    with jax.enable_x64(True):
        model = load_model(tiny_model, dtype="float64", param_dtype="float64")
        for row, new in zip(rows, written, strict=True):
            assert {name: new[name] for name in row} == row
            for side in ("chosen", "rejected"):
                logps = []
                for frame in ("Be good.\n", "Be bad.\n"):
                    prompt = frame + str(row.get("prompt", row.get(f"{side}_prompt")))
                    ids = tokenizer.tokenizer(prompt)["input_ids"]
                    response = tokenizer.tokenizer(row[side], add_special_tokens=False)["input_ids"]
                    whole = [*ids, *response, tokenizer.tokenizer.eos_token_id]
                    table = one_sequence(model, whole)[1]
                    logps.append([table[at - 1, whole[at]] for at in range(len(ids), len(whole))])
                expected = 1 / (1 + np.exp(np.array(logps[1]) - np.array(logps[0]))) - 0.5
                np.testing.assert_allclose(new[f"{side}_token_rewards"], expected, atol=1e-10)


def test_what_is_asked_may_show_the_answer():
    """Once, whatever the texts hold; of a conversation the answer's last message."""
    from ches_jax.data.sources import Record
    from ches_jax.label.contrast import _framed

    row = Record(0, "a", "row 0", {"prompt": "Say {response}", "chosen": " yes {prompt}", "rejected": " no"})
    frame = "{prompt} Improve:{response}"
    assert _framed(row, "Say {response}", "chosen", frame) == {"prompt": "Say {response} Improve: yes {prompt}"}
    assert _framed(row, "Say {response}", "rejected", frame) == {"prompt": "Say {response} Improve: no"}
    talk = [{"role": "user", "content": "Hi"}]
    row = Record(0, "a", "row 0", {"prompt": talk, "chosen": [{"role": "assistant", "content": "Ho"}], "rejected": []})
    assert _framed(row, talk, "chosen", frame)["prompt"] == [{"role": "user", "content": "Hi Improve:Ho"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"better": "Be good."}, "expected {prompt} in it"),
        ({"better": "{prompt}", "worse": "{prompt}"}, "every reward would be 0"),
        ({"relabel": True}, "has nothing to go by"),
        ({"by": "file", "labels": "x", "better": "{prompt}"}, "--better is for --by contrast"),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    with pytest.raises(ChesError, match=message):
        label(LabelConfig(**{"by": "contrast", "out": str(tmp_path / "out"), **options}))


def test_a_prompt_of_token_ids_is_refused(tmp_path, tiny_model):
    pairs = write_lines(tmp_path / "p.jsonl", [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}])
    with pytest.raises(ChesError, match="this one is token ids"):
        label(LabelConfig(by="contrast", model=str(tiny_model), pairs=pairs, out=str(tmp_path / "out")))
