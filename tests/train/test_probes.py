"""Probe prompts: distributions against one sequence at a time, tokens that moved, whole runs."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from ches_jax import bundled
from ches_jax.data.tokenize import load_tokenizer
from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import DataError
from ches_jax.inputs import Opener
from ches_jax.losses import get_loss
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import abstract_decoder, named_parameters
from ches_jax.models.sharding import placement
from ches_jax.train import loop
from ches_jax.train.data.split import read_run_pairs
from ches_jax.train.loop import Stopped, train
from ches_jax.train.observe.probes import ProbeLog, Prober, Probes, entropy, moved, read_probes
from tests.helpers import one_sequence

from .test_loop import lines, stopping_at


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Five prompts of different lengths, one of them a conversation."""
    rows = [json.loads(line) for line in bundled.prompts_file().read_text().splitlines()[::12]]
    path = tmp_path_factory.mktemp("probes") / "prompts.jsonl"
    talk = {"prompt": [{"role": "user", "content": "What colour is snow?"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:4], talk]))
    return path


def read(path, directory, **options):
    opener = Opener()
    return read_probes(
        str(path), opener.model(directory), opener, template="auto", template_args={}, **{"max_length": None, **options}
    )


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2"])
def test_distributions_are_those_after_each_prompt_alone(tiny_model, prompts, mesh):
    probes = read(prompts, tiny_model)
    model = load_model(tiny_model)
    on = make_mesh(mesh)
    placed = named_parameters(load_model(tiny_model, sharding=placement(on)))
    logps = Prober(abstract_decoder(model.config), on, probes)(placed)
    assert logps.shape == (5, model.config.vocab_size)
    expected = load_tokenizer(tiny_model)("<|user|> What colour is snow?<|assistant|>").input_ids
    assert probes.ids[4] == tuple(expected)
    for ids, row in zip(probes.ids, logps, strict=True):
        np.testing.assert_allclose(row, one_sequence(model, ids)[1][-1], atol=2e-5)


def test_what_is_said_of_a_distribution(tmp_path, tiny_model):
    before = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]))
    with np.errstate(divide="ignore"):
        now = np.log(np.array([[0.25, 0.625, 0.125, 0.0], [0.25, 0.25, 0.25, 0.25]]))
    probes = Probes(load_tokenizer(tiny_model), [(5, 6), (7,)], ["a", "b"])
    log = ProbeLog(tmp_path, probes, before)
    assert log.record(0, before)["displacement/probe_total_variation"] == 0
    means = log.record(4, now)
    expected = -(0.25 * math.log(0.25) + 0.625 * math.log(0.625) + 0.125 * math.log(0.125))
    assert means == {
        "displacement/probe_entropy": pytest.approx((expected + math.log(4)) / 2),
        "displacement/probe_argmax_mass": pytest.approx((0.625 + 0.25) / 2),
        "displacement/probe_total_variation": pytest.approx(0.375 / 2),
        "displacement/probe_argmax_changed": 0.5,
    }
    rows = pq.read_table(log.join()).to_pylist()
    assert [(r["step"], r["index"]) for r in rows] == [(0, 0), (0, 1), (4, 0), (4, 1)]
    first = rows[2]
    assert [(t["token"], round(t["before"], 6), round(t["now"], 6)) for t in first["gaining"]] == [(1, 0.25, 0.625)]
    assert [t["token"] for t in first["losing"]] == [0, 3] and first["argmax_token"] == 1
    assert first["gaining"][0]["text"] == probes.text([1]) and rows[3]["gaining"] == rows[3]["losing"] == []


def test_changes_are_listed_by_size():
    before, now = np.full(40, 1 / 40), np.full(40, 1 / 40)
    now[[3, 7]] += [0.01, 0.02]
    now[[11, 12]] -= 0.015
    assert moved(before, now) == ([7, 3], [11, 12]) and moved(before, now, 1) == ([7], [11])
    assert entropy(np.log(now)) == pytest.approx(-(now * np.log(now)).sum())


@pytest.mark.slow
def test_a_run_follows_its_probes_and_resumes_to_the_same_bytes(small, prompts, tmp_path, monkeypatch):
    options = {"probes": str(prompts), "epochs": 2.0, "eval_every": 3, "save_every": 2, "lr": 3e-4}
    whole = train(small(tmp_path / "whole", **options), quiet=True)
    logged = [e for e in lines(whole) if "displacement/probe_entropy" in e]
    assert [e["step"] for e in logged] == [0, 3, 6]
    assert logged[0]["displacement/probe_total_variation"] == 0 < logged[-1]["displacement/probe_total_variation"]
    table = pq.read_table(whole / "probes.parquet").to_pylist()
    assert [(r["step"], r["index"]) for r in table] == [(s, i) for s in (0, 3, 6) for i in range(5)]
    for row in table[5:]:
        for side, sign in (("gaining", 1), ("losing", -1)):
            changes = [sign * (t["now"] - t["before"]) for t in row[side]]
            assert len(changes) == 10 and changes == sorted(changes, reverse=True) and changes[-1] > 0
    config = small(tmp_path / "run", **options)
    monkeypatch.setattr(loop, "JsonLines", stopping_at(5))
    with pytest.raises(Stopped):
        train(config, quiet=True)
    monkeypatch.undo()
    out = train(config, resume=True, quiet=True)
    for name in ("probes.parquet", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_bad_probes_are_one_message(tiny_model, prompts, tmp_path):
    with pytest.raises(DataError, match=r"line 1: a prompt of \d+ tokens; expected 1 to 7, of ids below 1291"):
        read(prompts, tiny_model, max_length=8)
    (tmp_path / "other.jsonl").write_text('{"wording": "why?"}\n')
    with pytest.raises(DataError, match="no column 'prompt'"):
        read(tmp_path / "other.jsonl", tiny_model)


def test_entropy_and_largest_probability_are_those_at_response_tokens(small, tiny_model, tmp_path):
    config = small(tmp_path / "run", steps=1)
    out = train(config, quiet=True)
    rows = pq.read_table(out / "displacement.parquet").to_pylist()
    model = load_model(tiny_model)
    opener = Opener()
    read = read_run_pairs(config, get_loss("dpo"), opener.model(tiny_model), opener)
    pairs = {p.row_id: p for p in read.held_out}
    for row in [r for r in rows if r["step"] == 0 and r["set"] == "held_out"][:3]:
        pair = pairs[row["row_id"]]
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            at = np.arange(len(response.targets("include"))) + len(pair.prompt) - 1
            table = one_sequence(model, [*pair.prompt, *response.content])[1][at]
            assert row[f"entropy_{side}"] == pytest.approx(-(np.exp(table) * table).sum(-1).mean(), rel=1e-4)
            assert row[f"argmax_mass_{side}"] == pytest.approx(np.exp(table.max(-1)).mean(), rel=1e-4)
    first = lines(out)[0]
    start = [r["entropy_chosen"] for r in rows if r["step"] == 0 and r["set"] == "train"]
    assert first["displacement/entropy_chosen"] == pytest.approx(np.mean(start))
    assert 0 < first["eval_displacement/argmax_mass_rejected"] <= 1


@pytest.mark.slow
def test_a_run_may_watch_nothing(small, tmp_path):
    out = train(small(tmp_path / "run", steps=1, watch=0, holdout=0, limit=8, export=False), quiet=True)
    assert pq.read_table(out / "displacement.parquet").num_rows == 0
