"""The accelerator benchmark runs anywhere at its tiny size, and never passes one device's numbers off as another's."""

import json

import pytest

from ches_jax import bundled
from experiments.benchmarks import measure
from experiments.benchmarks.accelerator import SHAPES, refuse
from experiments.benchmarks.accelerator_score import main, result, write_rows

OURS = {
    "ches_sum": -1.0,
    "seconds": 2.0,
    "matmul_gflops": 300.0,
    "matmul_peak_gflops": 400.0,
    "platform": "gpu",
    "device": "1 x H100 (gpu)",
}


def peer(**other):
    return {"ches_sum": -1.001, "seconds": 5.0, "device": "cuda", **other}


def test_the_fastest_peer_counts():
    runs = {"ours": [OURS], "torch batched 1": [peer()], "torch batched 2": [peer(seconds=4.0)]}
    assert result(runs, "gpu")["ratios"] == {"model FLOP utilisation": 0.75, "torch batched 2 / ours, seconds": 2.0}


@pytest.mark.parametrize(
    "runs", [{"ours": [OURS | {"platform": "cpu"}]}, {"ours": [OURS], "torch": [peer(device="cpu")]}]
)
def test_numbers_of_another_device_are_refused(runs):
    with pytest.raises(SystemExit, match="ran on cpu, not on the gpu"):
        result(runs, "gpu")


def test_another_computation_is_refused():
    with pytest.raises(SystemExit, match="checksums"):
        result({"ours": [OURS], "torch": [peer(ches_sum=-2.0)]}, "gpu")


def test_only_the_tiny_size_runs_on_a_cpu():
    refuse("tiny", "cpu")
    refuse("8b", "tpu")
    with pytest.raises(SystemExit, match="needs an accelerator"):
        refuse("1b", "cpu")


def test_the_classes_have_the_sizes_they_are_named_after():
    from ches_jax.models.decoder import parameter_count
    from ches_jax.models.families.registry import decoder_config

    counts = {n: parameter_count(decoder_config({"model_type": "llama", **s})) for n, s in SHAPES.items()}
    assert 1.2e9 < counts["1b"] < 1.3e9
    assert 8.0e9 < counts["8b"] < 8.1e9


def test_rows_are_lines_without_flags(tmp_path):
    clean = {"prompt": "Say it.", "chosen": " Yes", "rejected": " No"}
    lines = [json.dumps(row) for row in (clean, {**clean, "rejected": " Yes"}, {**clean, "chosen": " Sure"})]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n")
    write_rows(source, bundled.model_dir(), 8, target)
    assert target.read_text().splitlines() == [lines[0], lines[2]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_tiny_size_runs_from_end_to_end_and_keeps_nothing(shared, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    words = ["--size", "tiny", "--pairs", "8", "--repeats", "1", "--batch-tokens", "2048", "--peer-tokens", "2048"]
    words += ["--tokenizer", str(shared / "models" / "hh-tiny" / "fp32"), "--peers", str(shared / "peers")]
    main([*words, "--data", str(shared / "data" / "ultrafeedback_train.jsonl")])
    output = capsys.readouterr().out
    assert "tiny torch batched 2048 / ours, seconds" in output and "model FLOP utilisation" in output
    assert not list(tmp_path.iterdir())
