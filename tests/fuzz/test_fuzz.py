"""Every reader against damaged and made-up inputs: each is read or refused in words; none ends the process or hangs it.

An input follows from the name of its harness and a number, so that a finding is a number:

    python -m tests.fuzz.run HARNESS NUMBER 1

The slow test goes through ``COUNTS`` inputs of each harness in processes of their own, with a limit of time and memory;
``counts.json`` is what came of as many inputs last, from another number on; ``mended`` is what they found, and in which
run of the same inputs it was gone.
"""

import json
from pathlib import Path

import pytest

from tests.fuzz.inputs import HARNESSES
from tests.fuzz.run import attempt, findings

COUNTS = {
    "lines": 5000, "tables": 5000, "compressed": 2000, "folders": 1500, "tokenised": 1500, "schemas": 3000,
    "model_configs": 4000, "tokenizers": 600, "tensors": 4000, "adapters": 1500, "words": 4000, "command_lines": 1000,
    "run_directories": 3000, "training_logs": 2500, "templates": 600, "judges": 800,
}  # fmt: skip
FEW = 12
"""Inputs of each harness in the fast test."""


def test_every_harness_is_counted():
    assert COUNTS.keys() == HARNESSES.keys() and sum(COUNTS.values()) >= 40_000
    recorded = json.loads(Path(__file__).with_name("counts.json").read_text(encoding="utf-8"))
    assert {name: one["inputs"] for name, one in recorded["harnesses"].items()} == COUNTS
    assert not recorded["findings"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in COUNTS if name not in ("tokenizers", "templates")])
def test_a_few_inputs(name, tmp_path: Path):
    found = {number: what for number in range(FEW) if (what := attempt(name, number, tmp_path / "case"))}
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_many_inputs(name):
    found = findings(name, 0, COUNTS[name])
    print(f"\n{name}: {COUNTS[name]} inputs, {len(found)} findings")
    assert not found
