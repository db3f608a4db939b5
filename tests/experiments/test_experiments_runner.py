"""The runner: what it refuses, what it keeps, how a killed run ends; the report is what the results say."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ches_jax.errors import ChesError, RunError
from experiments import report, run
from experiments.framework import item as framework_item
from experiments.framework.intervals import spread, t_quantile
from experiments.framework.item import ReportLine, Scale, Stage, configure, execute, write_result

ROOT = Path(__file__).parents[2]
PRESENT = [item for item in framework_item.ITEMS if (ROOT / "experiments" / item / "__init__.py").exists()]


@dataclass(frozen=True, kw_only=True)
class Plain(Scale):
    factor: int = 2


@pytest.fixture
def item(monkeypatch):
    """An item of three stages that counts what it runs, and fails in the middle on request."""
    module = types.ModuleType("experiments.plain")
    module.ran, module.fail = [], False  # type: ignore[attr-defined]

    def stage(name, value):
        def work(w):
            module.ran.append(name)
            if module.fail and name == "b/1":
                w.folder("half").write_text("half")
                raise KeyboardInterrupt
            return value(w)

        return Stage(name, work)

    scale = Plain(model="bundled", pairs=None, seeds=(3, 4), hardware="any", time="none")
    module.TITLE, module.SCALES = "nothing", {"tiny": scale}  # type: ignore[attr-defined]
    module.stages = lambda config: [  # type: ignore[attr-defined]
        stage("a", lambda w: list(w.config.seeds)),
        stage("b/1", lambda w: {"x": w.value("a")[0] * w.config.factor}),
        stage("c", lambda w: w.value("b/1")["x"] + 1),
    ]
    module.summarise = lambda w: {"c": w.value("c")}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "experiments.plain", module)
    monkeypatch.setattr(framework_item, "ITEMS", ("plain",))
    return module


def test_stages_run_once_and_a_stopped_run_goes_on(item, tmp_path):
    config = configure("plain", "tiny", {"pairs": "bundled"})
    whole = json.loads(execute("plain", "tiny", config, tmp_path / "whole", resume=False, quiet=True).read_text())
    assert whole["result"] == {"c": 7} and whole["seeds"] == [3, 4]
    assert {"device", "machine", "versions", "commit", "seconds", "cpu_seconds"} <= whole.keys()
    item.ran.clear()
    item.fail = True
    with pytest.raises(KeyboardInterrupt):
        execute("plain", "tiny", config, tmp_path / "cut", resume=False, quiet=True)
    assert not (tmp_path / "cut" / "results.json").exists()
    with pytest.raises(RunError, match="--resume"):
        execute("plain", "tiny", config, tmp_path / "cut", resume=False, quiet=True)
    item.fail = False
    again = json.loads(execute("plain", "tiny", config, tmp_path / "cut", resume=True, quiet=True).read_text())
    assert item.ran == ["a", "b/1", "b/1", "c"]
    assert again["result"] == whole["result"]


def test_a_folder_of_another_run_is_refused(item, tmp_path):
    config = configure("plain", "tiny", {"pairs": "bundled"})
    execute("plain", "tiny", config, tmp_path / "r", resume=False, quiet=True)
    other = configure("plain", "tiny", {"pairs": "bundled", "seeds": (5,)})
    with pytest.raises(RunError, match="seeds"):
        execute("plain", "tiny", other, tmp_path / "r", resume=True, quiet=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "no item 'nothing'"),
        ([], "name an item"),
        (["persona", "--scale", "huge"], "no scale 'huge'; there are tiny, small, paper"),
        (["persona", "--scale", "small", "--out", "x"], "needs --model and --pairs"),
        (["persona", "--scale", "small", "--model", "./none", "--pairs", "./none.jsonl", "--out", "x"], "2 problems"),
        (["similarity"], "--out"),
        (["similarity", "--seeds", "1", "1", "--out", "x"], "different whole numbers"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_message(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.main(words) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_without_resume(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run.main(["similarity", "--scale", "tiny", "--out", str(tmp_path)]) == 2
    assert "holds no run of ours" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_the_catalogue_names_items_scales_and_needs(capsys):
    assert run.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{item}:" in text for item in PRESENT)
    assert "small" in text and "--model" in text and "allenai/OLMo-1B-hf" in text


@pytest.mark.parametrize("item", PRESENT)
def test_every_scale_of_every_item_has_a_plan(item):
    module = framework_item.load(item)
    assert [name for name in module.SCALES if not name.startswith("small-")] == ["tiny", "small", "paper"]
    for scale in module.SCALES.values():
        names = [s.name for s in module.stages(scale)]
        assert len(names) == len(set(names)) > 3
        assert scale.hardware and scale.time


def test_importing_items_loads_no_jax():
    code = "import sys, experiments.run, experiments.report; " + "".join(f"import experiments.{i}; " for i in PRESENT)
    process = subprocess.run(
        [sys.executable, "-c", code + "print([m for m in ('jax', 'torch', 'transformers') if m in sys.modules])"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert process.stdout.strip() == "[]"


def test_a_result_is_written_short_and_read_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": [{"c": ["x, [y]\n z", "\u201cq\u201d"]}, []], "d": [[1, 2], [3]]}
    write_result(tmp_path / "r.json", value)
    assert json.loads((tmp_path / "r.json").read_text()) == value
    assert '"a": [1, 2.5, null]' in (tmp_path / "r.json").read_text()
    with pytest.raises(ValueError):
        write_result(tmp_path / "n.json", {"a": float("nan")})
    assert not (tmp_path / "n.json").exists()


def test_spread_is_students_t():
    values = [0.3, 0.9, 0.1, 0.4]
    s = spread(values)
    assert s is not None
    half = 3.182446 * np.std(values, ddof=1) / 2
    assert s["high"] - s["mean"] == pytest.approx(half, rel=1e-6) and s["mean"] - s["low"] == pytest.approx(half)
    assert (s["min"], s["max"], s["n"]) == (0.1, 0.9, 4)
    assert t_quantile(1) == pytest.approx(12.7062, rel=1e-5)
    one = spread([2.0])
    assert one is not None and one["low"] == one["high"] == 2.0 and spread([]) is None


def test_the_report_replaces_only_its_part():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.replaced(text, "new") == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"
    with pytest.raises(RunError, match="once each"):
        report.replaced("nothing", "new")


def test_a_line_of_the_report_escapes_bars(item, tmp_path):
    result = {"item": "plain", "seeds": [1], "commit": "abc"}
    text = report.table("tiny", result, [ReportLine("a|b", "c", "d", "e", "f", "g")])
    assert "a\\|b" in text and "`c`" in text


def test_the_readme_says_what_the_committed_results_say(capsys):
    assert report.main(["--check"]) == 0, "run python -m experiments.report"


def test_a_foreign_file_among_the_results_is_named(tmp_path):
    folder = tmp_path / "experiments" / "persona" / "results"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text("{}")
    with pytest.raises(ChesError, match=r"x\.json: not a result of persona"):
        report.results(tmp_path)


def start(words):
    env = {**os.environ, "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-m", "experiments.run", *words], cwd=ROOT, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("item", PRESENT)
def test_every_item_runs_at_tiny(item, tmp_path):
    assert start([item, "--scale", "tiny", "--out", str(tmp_path / "out"), "--quiet"]).wait() == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["cpu_seconds"] < 2 * 600, "ten minutes on two cores"
    module = framework_item.load(item)
    assert all(len(row) == len(ReportLine._fields) and all(row) for row in module.rows(result))
    drawn = module.figures(result, "tiny", tmp_path / "figures")
    assert drawn and all(p.stat().st_size > 5000 for p in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("item", PRESENT)
def test_a_killed_item_resumes_to_the_same_result(item, tmp_path):
    words = [item, "--scale", "tiny", "--seeds", "9773", "--quiet", "--out"]
    assert start([*words, str(tmp_path / "whole")]).wait() == 0
    stages = len(list((tmp_path / "whole" / "stages").rglob("*.json")))
    for after in (stages // 3, 2 * stages // 3):
        process = start([*words, str(tmp_path / "cut"), "--resume"])
        while len(list((tmp_path / "cut" / "stages").rglob("*.json"))) < after:
            assert process.poll() is None
            time.sleep(0.2)
        time.sleep(1.0)  # into the next stage
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut" / "results.json").exists()
    assert start([*words, str(tmp_path / "cut"), "--resume"]).wait() == 0
    whole, cut = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "cut"))
    assert cut["result"] == whole["result"] and cut["config"] == whole["config"]
