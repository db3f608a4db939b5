"""What TensorBoard and Weights & Biases are shown: every number of metrics.jsonl, once."""

import json
import struct
import sys
from types import SimpleNamespace

import pytest

from ches_jax.cli import main
from ches_jax.errors import ChesError
from ches_jax.train import loop, trackers
from ches_jax.train.loop import Stopped, train
from ches_jax.train.metrics import JsonLines

from .test_loop import Killed, lines, stopping_at

OPTIONS = {"epochs": 2.0, "eval_every": 2, "save_every": 2}


def events(folder):
    """All events of a folder's files: length (8), crc (4), event, crc (4), again and again."""
    from tensorboardX.crc32c import crc32c  # type: ignore[import-untyped]
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]

    def masked(data: bytes) -> int:
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack("<Q", raw[at : at + 8])
            body = raw[at + 12 : at + 12 + length]
            assert struct.unpack("<I", raw[at + 8 : at + 12])[0] == masked(raw[at : at + 8])
            assert struct.unpack("<I", raw[at + 12 + length : at + 16 + length])[0] == masked(body)
            yield Event.FromString(body)
            at += 16 + length


def scalars(folder):
    """What a reader shows: events of earlier files from a restart's step on are forgotten, as TensorBoard does."""
    shown: list[tuple[int, str, float]] = []
    for event in events(folder):
        if event.HasField("session_log"):
            shown = [e for e in shown if e[0] < event.step]
        shown += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return shown


def logged(out):
    return [(e["step"], name, value) for e in lines(out) for name, value in e.items() if name != "step"]


def require_shown(points, out):
    expected = logged(out)
    assert len(points) == len(expected) == len({(step, name) for step, name, _ in points})
    for (step, name, value), (at, key, number) in zip(points, expected, strict=True):
        assert (step, name) == (at, key) and value == pytest.approx(number, rel=1e-6)  # events hold float32


@pytest.mark.slow
def test_a_resumed_run_shows_every_step_once_in_tensorboard(small, tmp_path, monkeypatch):
    class Dying(JsonLines):
        at = -1

        def log(self, step, values):
            super().log(step, values)
            if step == self.at:
                raise Killed

    config = small(tmp_path / "run", tracker=("tensorboard",), **OPTIONS)
    for at in (1, 3):  # before there is a checkpoint, and behind one
        monkeypatch.setattr(Dying, "at", at)
        monkeypatch.setattr(loop, "JsonLines", Dying)
        with pytest.raises(Killed):
            train(config, resume=at > 1, quiet=True)
    monkeypatch.setattr(loop, "JsonLines", stopping_at(5))
    with pytest.raises(Stopped):
        train(config, resume=True, quiet=True)
    monkeypatch.undo()
    out = train(config, resume=True, quiet=True)
    assert len(list((out / "tensorboard").iterdir())) == 4
    require_shown(scalars(out / "tensorboard"), out)


@pytest.fixture
def service(monkeypatch):
    """A fake of the package, since the real one is large: what each run of it receives.

    Online, a run that is found again says where to continue, and refuses earlier steps; offline it knows nothing.
    """
    seen = SimpleNamespace(online=True, runs=[])

    def init(**settings):
        run = SimpleNamespace(settings=settings, lines=[], done=False, resumed=seen.online and bool(seen.runs))
        run.step = seen.runs[-1].lines[-1][0] + 1 if run.resumed else 0

        def log(values, step):
            assert step >= run.step
            run.lines.append((step, values))

        run.log, run.finish = log, lambda: setattr(run, "done", True)
        seen.runs.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    return seen


@pytest.mark.parametrize("online", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_sends_every_line_once(small, tmp_path, monkeypatch, service, online):
    class Dying(JsonLines):
        def log(self, step, values):
            super().log(step, values)
            if step == 3:
                raise Killed  # a line is behind the checkpoint of update 2

    service.online = online
    config = small(tmp_path / "run", tracker=("wandb",), **OPTIONS)
    monkeypatch.setattr(loop, "JsonLines", Dying)
    with pytest.raises(Killed):
        train(config, quiet=True)
    monkeypatch.setattr(loop, "JsonLines", JsonLines)
    out = train(config, resume=True, quiet=True)
    first, second = service.runs
    assert first.settings["id"] == second.settings["id"] == json.loads((out / "wandb.json").read_text())["id"]
    assert first.settings["resume"] == "allow" and first.settings["config"]["loss"] == "dpo" and second.done
    sent = [*first.lines, *second.lines] if online else second.lines
    assert [(step, name, value) for step, values in sent for name, value in values.items()] == logged(out)


def test_a_package_that_is_not_there_is_one_message(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    words = ["train", "--out", str(tmp_path / "run"), "--tracker", "wandb", "--tracker", "tensorboard"]
    assert main(words) == 2
    assert (
        "--tracker wandb: the package wandb is not installed; pip install 'ches-jax[wandb]'" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ChesError, match="expected one of tensorboard, wandb"):
        trackers.require_trackers(["mlflow"])
