"""``ches forecast`` and ``ches influence``: what they write, what they refuse, what a killed run does."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.cli import main
from ches_jax.errors import ChesError
from ches_jax.forecast.config import ForecastConfig, InfluenceConfig
from ches_jax.forecast.influence import concentration, influence_of
from ches_jax.forecast.run import forecast, influence
from ches_jax.forecast.summary import summarise
from ches_jax.runs.directory import read_json
from ches_jax.select.config import SelectConfig
from ches_jax.select.run import select


@pytest.fixture(scope="session")
def small(tiny_model):
    return {
        "model": str(tiny_model),
        "limit": 20,
        "holdout": 8,
        "batch_size": 4,
        "lr": 1e-5,
        "steps": 6,
        "mesh": "data=1",
    }


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """A forecast that nothing disturbed."""
    out = tmp_path_factory.mktemp("forecast") / "whole"
    return forecast(ForecastConfig(**small, chunk_rows=5, out=str(out)), quiet=True)


@pytest.fixture(scope="session")
def influenced(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("forecast") / "influence"
    return influence(InfluenceConfig(**small, chunk_rows=5, out=str(out)), quiet=True)


def test_every_pair_has_its_forecast_and_the_summary_says_the_same(whole):
    table, recorded = pq.read_table(whole / "forecast.parquet"), read_json(whole / "run.json")["summary"]
    assert table["set"].to_pylist() == ["train"] * 12 + ["probe"] * 8
    chosen = table["forecast_chosen"].to_numpy()
    assert recorded["sets"]["probe"]["forecast_chosen"] == pytest.approx(chosen[12:].mean())
    assert np.array_equal(chosen, table["first_chosen"].to_numpy())
    assert table["second_chosen"].null_count == 20
    assert "at first order this data set" in recorded["reason"] and recorded["linear_error"].keys() == {
        "train",
        "probe",
    }
    assert not (whole / "parts").exists()


@pytest.mark.slow
def test_influences_add_up_to_the_change_in_the_metric_of_the_run(small, tmp_path, x64):
    """In float64: RMSProp divides by squares that in float32 are rounding here and there, which moves sums by 6e-3."""
    forecast(ForecastConfig(**small, dtype="float64", out=str(tmp_path / "forecast")), quiet=True)
    influence(InfluenceConfig(**small, dtype="float64", out=str(tmp_path / "influence")), quiet=True)
    table = pq.read_table(tmp_path / "influence" / "influence.parquet")
    nats = read_json(tmp_path / "forecast" / "run.json")["summary"]["products"]["probes_nats"]
    # the forecast's metric is that of the same twelve pairs: the same sums, chosen by chosen
    for name in ("from_chosen", "from_rejected"):
        assert -table[name].to_numpy().sum() == pytest.approx(nats[name], rel=1e-9)


@pytest.mark.slow
def test_an_influence_is_the_sum_of_its_parts_and_probes_are_left_out(influenced):
    table = pq.read_table(influenced / "influence.parquet")
    assert table["influence"].to_numpy() == pytest.approx(
        table["from_chosen"].to_numpy() + table["from_rejected"].to_numpy()
    )
    dropped = [json.loads(line) for line in (influenced / "dropped.jsonl").read_text().splitlines()]
    assert [d["reasons"] for d in dropped] == [["held out as a probe"]] * 8


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "kept"), [("lowest:0.5", 6), ("soft:0.5", 12)])
def test_select_keeps_the_pairs_of_least_influence(influenced, tmp_path, keep, kept):
    summary = select(SelectConfig(scores=influenced, by="influence", keep=keep, out=tmp_path / "kept"))
    rows = [json.loads(line) for line in (tmp_path / "kept" / "pairs.jsonl").read_text().splitlines()]
    values = np.sort(pq.read_table(influenced / "influence.parquet")["influence"].to_numpy())
    assert summary["counts"]["kept"] == kept
    assert sorted(r["influence"] for r in rows) == pytest.approx(values[:kept].tolist())
    if keep.startswith("soft"):
        order = np.argsort([r["influence"] for r in rows])
        weights = np.array([r["weight"] for r in rows])[order]
        assert (np.diff(weights) <= 1e-12).all() and weights[0] > weights[-1]


@pytest.mark.slow
def test_a_killed_forecast_goes_on_where_it_was(whole, small, tmp_path, monkeypatch):
    from ches_jax.forecast import run as runs

    out, write, config = tmp_path / "run", runs.write_table, {**small, "chunk_rows": 5}

    def stop_at_the_third(path, table):
        if path.name == "part-000002.parquet":
            raise KeyboardInterrupt
        return write(path, table)

    monkeypatch.setattr(runs, "write_table", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        forecast(ForecastConfig(**config, out=str(out)), quiet=True)
    monkeypatch.setattr(runs, "write_table", write)
    # what is there is not computed again
    monkeypatch.setattr("ches_jax.forecast.setup.FrozenUpdates", None)
    forecast(ForecastConfig(**config, out=str(out)), resume=True, quiet=True)
    assert pq.read_table(out / "forecast.parquet").equals(pq.read_table(whole / "forecast.parquet"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["influence"], "whose chosen responses should not fall"),
        (["influence", "--holdout", "4", "--loss", "kto"], "its gradient is not made of whole responses of pairs"),
        (["forecast", "--optimizer", "adafactor"], "its metric is not known"),
        (["forecast", "--loss", "tdpo"], "a forecast of divergences and masks of tokens is not known"),
        (["forecast", "--pilot", "2", "--schedule", "cosine", "--steps", "9"], "use --schedule constant"),
        (["forecast", "--pilot", "-1"], "expected the number of updates"),
        (["forecast", "--pilot", "2", "--distributed", "auto"], "a pilot is a training run of one process"),
        (["forecast", "--order", "3"], "order"),
        (["forecast", "--chunk-rows", "0"], "--chunk-rows 0"),
        (["forecast", "--probes", "p.jsonl", "--holdout", "2"], "give one of them"),
    ],
)
def test_what_cannot_be_forecast_is_refused_in_one_message(tiny_model, tmp_path, capsys, words, message):
    out = tmp_path / "run"
    rest = ["--model", str(tiny_model), "--limit", "12", "--mesh", "data=1", "--quiet", "--out", str(out)]
    assert main([*words, *rest]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (out / "run.json").exists()


@pytest.mark.slow
def test_probes_that_are_training_pairs_are_reported(small, tmp_path):
    from ches_jax.bundled import pairs_file

    lines = pairs_file().read_text(encoding="utf-8").splitlines()[:12]
    (tmp_path / "some.jsonl").write_text("\n".join(lines[4:]) + "\n", encoding="utf-8")
    options = {**small, "limit": 8, "holdout": 0, "steps": 1, "probes": str(tmp_path / "some.jsonl")}
    out = forecast(ForecastConfig(**options, out=str(tmp_path / "run")), quiet=True)
    recorded = read_json(out / "run.json")["summary"]
    assert recorded["probes_that_are_training_pairs"] == 4
    assert any("4 of 8 probes are training pairs" in w for w in recorded["warnings"])
    # a violent rate is said to leave the linear range
    shutil.rmtree(out)
    out = forecast(ForecastConfig(**{**options, "lr": 0.1}, out=str(tmp_path / "run")), quiet=True)
    assert any("leaves the linear range" in w for w in read_json(out / "run.json")["summary"]["warnings"])


def test_the_means_of_a_set_are_over_its_pairs_and_a_margin_is_chosen_less_rejected():
    columns = {"set": ["train", "probe", "probe"], "forecast_chosen": [9.0, 1.0, -2.0]}
    table = pa.table({**columns, "forecast_rejected": [9.0, -3.0, -4.0]})
    found = summarise(table, {}, {}, overlap=0, config=ForecastConfig(), updates=1)["sets"]["probe"]
    assert found == {
        "pairs": 2, "forecast_chosen": -0.5, "forecast_rejected": -3.5, "forecast_margin": 3.0, "chosen_falls": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(("second", "said"), [(-0.07, "first order gives -0.06"), (-0.054, None)])
def test_parts_that_do_not_add_up_to_the_forecast_say_why(second, said):
    columns = {"set": ["train", "probe", "probe"], "forecast_chosen": [9.0] * 3, "forecast_rejected": [0.0] * 3}
    table = pa.table({**columns, "first_chosen": [9.0, -0.05, second]})
    effect = {"from_chosen": 267.34, "from_rejected": -267.39}
    products = {"products": {"probes_nats": effect, "train_nats": effect}, "reason": "it lowers them by -0.05"}
    found = summarise(table, products, {}, overlap=0, config=ForecastConfig(), updates=1)["reason"]
    assert found.startswith("it lowers them by -0.05")
    assert found.endswith(said) if said else found == products["reason"]


def test_influence_is_slope_times_rate_over_the_pairs():
    found = influence_of([np.array([2.0, 3.0])], np.array([[-0.5, 0.25]]), 10)
    assert found.from_chosen == pytest.approx([-0.1]) and found.from_rejected == pytest.approx([0.075])
    assert found.total == pytest.approx([-0.025])


def test_concentration_of_pairs_that_only_help():
    recorded = concentration(np.array([-1.0, -2.0]))
    assert recorded["push_down"] == 0 and recorded["share_of_fall"] == {"10%": None, "25%": None, "50%": None}


@pytest.mark.slow
def test_other_losses_have_a_forecast_too(small, tmp_path):
    """A loss of tokens has no split into responses, and says so by leaving it out."""
    out = forecast(ForecastConfig(**{**small, "steps": 1}, loss="ld_dpo", out=str(tmp_path / "run")), quiet=True)
    recorded = read_json(out / "run.json")["summary"]
    assert recorded["products"] is None and np.isfinite(recorded["sets"]["train"]["forecast_chosen"])


def test_settings_that_no_forecast_reads_are_no_options():
    with pytest.raises(TypeError):
        ForecastConfig(eval_every=1)  # type: ignore[call-arg]
    with pytest.raises(ChesError):
        influence(InfluenceConfig(), quiet=True)
