"""The accelerator benchmark of training runs anywhere at its tiny size, and keeps to the requested device."""

import sys

import pytest

from experiments.benchmarks import measure
from experiments.benchmarks.accelerator_train import main, result

OURS = {
    "s_per_step_median": 2.0,
    "needed_gflop": 600.0,
    "matmul_peak_gflops": 400.0,
    "platform": "gpu",
    "device": "1 x H100 (gpu)",
    "top_costs": [{"name": "gemm", "share": 0.6, "seconds": 1.2}],
}
TRL = {"s_per_step_median": 5.0, "platform": "gpu"}


def test_utilisation_is_what_is_needed_over_the_peak_and_the_median_run_counts():
    runs = {"ours": [OURS, {**OURS, "s_per_step_median": 9.0}, OURS], "trl": [TRL, TRL, TRL]}
    assert result(runs, "gpu")["ratios"] == {"model FLOP utilisation": 0.75, "trl / ours, seconds": 2.5}
    assert result({"ours": [OURS]}, "gpu")["ratios"] == {"model FLOP utilisation": 0.75}


@pytest.mark.parametrize(
    "runs", [{"ours": [{**OURS, "platform": "cpu"}]}, {"ours": [OURS], "trl": [{**TRL, "platform": "cpu"}]}]
)
def test_numbers_of_another_device_are_refused(runs):
    with pytest.raises(SystemExit, match="ran on cpu, not on the gpu"):
        result(runs, "gpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_tiny_size_runs_from_end_to_end_and_keeps_nothing(shared, capsys, monkeypatch, tmp_path):
    """Beside TRL too."""
    pytest.importorskip("trl")
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    words = ["--size", "tiny", "--pairs", "2", "--steps", "2", "--repeats", "1", "--lengths", "384+128"]
    words += ["--tokenizer", str(shared / "models" / "hh-tiny" / "fp32"), "--trl", sys.executable]
    main(words)
    output = capsys.readouterr().out
    assert "model FLOP utilisation" in output and " ms a step" in output and " %  " in output
    assert "trl / ours, seconds" in output
    assert not list(tmp_path.iterdir())
