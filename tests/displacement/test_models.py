"""Two models on the same pairs: the changes are those of their log-probabilities, of the same tokens."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.errors import ChesError
from ches_jax.scores.table import read_table
from tests.helpers import write_lines


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [{"prompt": f"Say {i}.", "chosen": f" yes {i}", "rejected": f" no, not {i}"} for i in range(10)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_model_does_not_differ_from_itself(tiny_model, pairs, tmp_path):
    config = DiagnoseConfig(before=str(tiny_model), after=str(tiny_model), pairs=pairs, out=str(tmp_path / "d"))
    found = diagnose(config)
    assert found.pairs == 10 and found.verdict == "not_displaced" and found.chosen.mean == 0
    assert np.allclose([row["chosen"] for row in found.worst], 0) and found.worst[0]["text"].startswith('" yes')
    assert (tmp_path / "d/before/scores.parquet").exists()
    assert not any("left out" in note for note in found.caveats)
    tables = [str(tmp_path / "d" / side) for side in ("before", "after")]
    by_folder, by_file = (
        diagnose(DiagnoseConfig(before=tables[0] + end, after=tables[1] + end)) for end in ("", "/scores.parquet")
    )
    assert by_file.to_json() == by_folder.to_json() and by_file.worst[0]["text"].startswith('" yes')
    before = {path: path.read_bytes() for path in (tmp_path / "d").rglob("*.*") if path.is_file()}
    (tmp_path / "d/after/run.json").unlink()  # as of a diagnosis that was killed there
    (tmp_path / "d/diagnosis.json").unlink()
    assert diagnose(config).to_json() == found.to_json()
    changed = [p.name for p, content in before.items() if p.name != "run.json" and p.read_bytes() != content]
    assert not changed
    with pytest.raises(ChesError, match=r"before holds another run; give a new directory with --out:.*limit"):
        diagnose(replace(config, limit=9))
    with pytest.raises(ChesError, match="is no score table; give two models, or two score tables"):
        diagnose(DiagnoseConfig(before=str(tmp_path / "d/before"), after=str(tiny_model), pairs=pairs))
    with pytest.raises(ChesError, match="needs --pairs"):
        diagnose(DiagnoseConfig(before=str(tiny_model), after=str(tiny_model)))
    with pytest.raises(ChesError, match=r"scores of one model; changes take two"):
        diagnose(DiagnoseConfig(path=str(tmp_path / "d/before")))


def test_rows_that_were_left_out_are_told(tiny_model, pairs, tmp_path):
    long = {"prompt": "Say. " * 400, "chosen": " a", "rejected": " b"}
    path = Path(write_lines(tmp_path / "p.jsonl", [*map(json.loads, Path(pairs).read_text().splitlines()), long]))
    config = DiagnoseConfig(before=str(tiny_model), after=str(tiny_model), pairs=str(path), out=str(tmp_path / "d"))
    found = diagnose(replace(config, max_length=64, on_bad_row="drop"))
    assert found.pairs == 10
    note = "1 of 11 rows are not fit to be scored and were left out: after/dropped.jsonl of --out says why"
    assert note in found.caveats and (tmp_path / "d/after/dropped.jsonl").is_file()


@pytest.fixture(scope="module")
def moved(tiny_model, tmp_path_factory):
    """The tiny model with another unembedding, and an adapter of the tiny model."""
    from safetensors.numpy import load_file, save_file

    from ches_jax.hf.directory import read_config
    from ches_jax.models.adapters.lora import adapted, adapter_shapes, make_spec
    from ches_jax.models.adapters.peft import write_adapter
    from ches_jax.models.decoder import abstract_decoder
    from ches_jax.models.families.registry import decoder_config

    out = tmp_path_factory.mktemp("moved")
    shutil.copytree(tiny_model, out / "model")
    rng = np.random.default_rng(0)
    weights = load_file(out / "model/model.safetensors")
    name = next(n for n in weights if "norm" in n)
    weights[name] = (weights[name] + 0.3 * rng.normal(size=weights[name].shape)).astype(weights[name].dtype)
    save_file(weights, out / "model/model.safetensors", {"format": "pt"})
    config = decoder_config(read_config(tiny_model))
    spec = make_spec(2, 4.0, "all-linear", config)
    shapes = adapter_shapes(adapted(abstract_decoder(config), spec))
    arrays = {n: (0.2 * rng.normal(size=s.shape)).astype(np.float32) for n, s in shapes.items()}
    write_adapter(out / "adapter", arrays, spec, tiny_model)
    return out


@pytest.mark.parametrize("after", ["model", "adapter"])
def test_changes_are_the_second_less_the_first(tiny_model, moved, pairs, tmp_path, after):
    found = diagnose(
        DiagnoseConfig(before=str(tiny_model), after=str(moved / after), pairs=pairs, out=str(tmp_path / "d"))
    )
    tables = [read_table(tmp_path / "d" / name)[0] for name in ("before", "after")]
    for side in ("chosen", "rejected"):
        first, second = (table[f"logp_{side}"].to_numpy() for table in tables)
        assert getattr(found, side).mean == pytest.approx((second - first).mean())
    assert abs(found.chosen.mean) > 1e-3


def mean_gain(answers: Path, before: Path, after: Path) -> float:
    """What ln pi of the answers gains in nats, by transformers in float64, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (after, before)]
    gains = []
    for pair in map(json.loads, answers.read_text().splitlines()):
        for answer in (pair["chosen_ids"], pair["rejected_ids"]):
            ids, start = torch.tensor([pair["prompt_ids"] + answer]), len(pair["prompt_ids"])
            with torch.no_grad():
                logps = [model(ids).logits[0, start - 1 : -1].log_softmax(-1) for model in models]
            gains.append(float((logps[0] - logps[1])[range(len(answer)), answer].sum()))
    return float(np.mean(gains))


@pytest.mark.slow
def test_answers_of_both_models_are_written_judged_and_split(tiny_model, moved, pairs, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(12)))
    options = {"before": str(tiny_model), "pairs": pairs, "generate": str(prompts), "want": "answer"}
    found = diagnose(DiagnoseConfig(after=str(moved / "model"), out=str(tmp_path / "d"), **options))
    assert all(c.outcome != "not measured" for c in found.harm.criteria if c.of_texts)
    assert found.on_policy is not None and not found.on_policy.own and found.on_policy.pairs == 12
    assert found.on_policy.kl.low > 0  # the models differ
    assert "24 answers of the first model itself fell by KL" in found.text()
    gains = [
        mean_gain(tmp_path / "d" / f, tiny_model, moved / "model") for f in ("answers.jsonl", "answers-after.jsonl")
    ]
    assert found.on_policy.reverse_kl is not None and found.on_policy.reverse_kl.mean > 0
    divergences = -found.on_policy.kl.mean, found.on_policy.reverse_kl.mean
    # sums of 1,800 nats in float32; a terminator more in the answers that were cut makes 0.01 to 0.03
    assert gains == pytest.approx(divergences, abs=1e-3)
    same = diagnose(DiagnoseConfig(after=str(tiny_model), **options))
    assert same.on_policy is not None and same.on_policy.kl.mean == pytest.approx(0, abs=1e-4)
    adapted = diagnose(DiagnoseConfig(after=str(moved / "adapter"), **options))
    assert adapted.on_policy is not None and adapted.on_policy.kl.low > 0
