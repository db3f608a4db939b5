"""``ches label`` by two processes: the columns of one, written by the first alone; slow."""

import json
import socket

import numpy as np
import pytest

from ches_jax import bundled
from tests.helpers import finish
from tests.scores.test_score_processes import start

pytestmark = pytest.mark.slow
PHRASES = "+ Good.\n- Bad.\n+ That is right.\n- That is wrong.\n"


def rows(out):
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("by", "column"),
    [
        ("implicit-reward", "chosen_reward"),
        ("follow-up", "rejected_reward"),
        ("contrast", "chosen_token_rewards"),
    ],
)
def test_two_processes_label_as_one_and_the_first_one_alone_writes(tiny_model, tmp_path, by, column):
    """They see no disk in common but the model and the pairs: each is given a folder of its own."""
    phrases = tmp_path / "phrases.txt"
    phrases.write_text(PHRASES, encoding="utf-8")
    own = {"implicit-reward": ["--reference", str(bundled.model_dir())], "follow-up": ["--phrases", str(phrases)]}
    words = ["--by", by, "--model", str(tiny_model), "--limit", "6", *own.get(by, [])]
    cache = tmp_path / "compiled"
    codes, said = finish(start("label", 1, 1, [*words, "--out", str(tmp_path / "alone")], cache))
    assert codes == [0], said
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for i, folder in enumerate(("first", "second")):
        who = ["--mesh", "data=2,fsdp=2", "--out", str(tmp_path / folder), "--distributed", f"127.0.0.1:{port},2,{i}"]
        processes += start("label", 1, 2, [*words, *who], cache)
    codes, said = finish(processes)
    assert codes == [0, 0], said
    assert not (tmp_path / "second").exists()
    found, expected = rows(tmp_path / "first"), rows(tmp_path / "alone")
    assert len(found) == 6 and [row["row_id"] for row in found] == [row["row_id"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[column], other[column], rtol=2e-4, atol=1e-3)
    assert json.loads((tmp_path / "first" / "label.json").read_text())["counts"]["labelled"] == 6
