"""A corpus of logs, each with its right answer: what TRL wrote, and other formats as they are documented.

``logs/expected.json`` says for each directory where it is from and what a diagnosis tells of it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.displacement.readers.find import read_log
from ches_jax.errors import ChesError

LOGS = Path(__file__).parent / "logs"
EXPECTED = json.loads((LOGS / "expected.json").read_text())


def test_every_log_has_its_answer():
    assert {p.name for p in LOGS.iterdir() if p.is_dir()} == set(EXPECTED) and len(EXPECTED) >= 20


@pytest.mark.parametrize("name", EXPECTED)
def test_a_log_is_read_as_what_it_is(name):
    expected = EXPECTED[name]
    if "refused" in expected:
        with pytest.raises(ChesError, match=expected["refused"]):
            diagnose(DiagnoseConfig(path=str(LOGS / name)))
        return
    found = diagnose(DiagnoseConfig(path=str(LOGS / name)))
    answer = found.to_json()
    assert found.verdict == expected["verdict"] and found.directions["rejected"] == expected["rejected"]
    assert (answer["unit"], answer["pairs"], answer["scale"]) == (
        expected["unit"],
        expected["count"],
        expected["scale"],
    )
    if expected["scale"] == "nats":
        assert answer["chosen"]["mean"] == pytest.approx(expected["chosen"], abs=1e-3)
    else:
        assert answer["chosen"]["mean"] is None and answer["rewards"]["chosen"]["mean"] is not None
    assert found.text().startswith(f"verdict: {found.verdict} ") and "nan" not in found.text()
    assert (found.beside is not None) is (expected.get("beside") is not None)


def test_events_of_tensorboard_are_read_as_the_state_of_the_same_run(tmp_path):
    from tensorboardX import SummaryWriter

    history = json.loads((LOGS / "llama_factory/trainer_state.json").read_text())["log_history"]
    with SummaryWriter(str(tmp_path / "runs/first")) as writer:
        for entry in history:
            for key, value in entry.items():
                tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                if key != "step":
                    writer.add_scalar(tag, value, entry["step"])
    state, events = read_log(LOGS / "llama_factory"), read_log(tmp_path)
    assert state.series.keys() == events.series.keys()
    for key, series in state.series.items():
        assert events.series[key].steps.tolist() == series.steps.tolist()
        assert events.series[key].values == pytest.approx(series.values, rel=1e-6)
    file = next((tmp_path / "runs/first").iterdir())
    file.write_bytes(file.read_bytes()[:-7])
    assert "is cut off" in read_log(file).notes[0]
    with SummaryWriter(str(tmp_path / "runs/second")) as writer:
        writer.add_scalar("train/rewards/chosen", 1.0, 1)
    with pytest.raises(ChesError, match="holds 2 runs"):
        read_log(tmp_path)


def test_a_real_run_of_trl_is_no_all_clear(shared):
    """Its held-out chosen fell by 0.122 nats, which two evaluations cannot call a verdict; once it was `wanted`."""
    found = diagnose(DiagnoseConfig(path=str(shared / "logs/trl_run")))
    assert found.verdict == "undecided" and found.unit == "evaluations" and found.pairs == 2
    assert found.chosen.mean == pytest.approx(-0.122, abs=1e-3)
    assert found.rejected.mean == pytest.approx(-0.146, abs=1e-3)
    assert found.beside is not None and found.beside.unit == "steps" and found.beside.pairs == 14
    events = diagnose(DiagnoseConfig(path=str(shared / "logs/trl_run/tensorboard")))
    assert events.chosen.mean == pytest.approx(found.chosen.mean, abs=1e-6)


def test_a_log_is_diagnosed_without_what_a_model_needs():
    code = (
        "import sys; from ches_jax.cli import main\n"
        f"assert main(['diagnose', {str(LOGS / 'llama_factory')!r}, '--json']) == 0\n"
        "heavy = ('jax', 'flax', 'optax', 'orbax', 'transformers', 'datasets', 'matplotlib')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    record, loaded = done.stdout.splitlines()
    assert loaded == "[]", done.stderr
    answer = json.loads(record)
    assert (
        answer["verdict"] == "displaced"
        and answer["chosen"]["low"] <= answer["chosen"]["mean"] <= answer["chosen"]["high"]
    )
