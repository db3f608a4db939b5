"""The whole of ``ches score``: numbers against one sequence at a time, invariances, resume, golden models."""

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ches_jax import bundled
from ches_jax.data.packing import pack
from ches_jax.data.sources import open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
from ches_jax.distributed.mesh import make_mesh
from ches_jax.distributed.processes import Process
from ches_jax.errors import ChesError, RunError
from ches_jax.models.checkpoint.load import load_model
from ches_jax.report.page import report
from ches_jax.runs.directory import read_json
from ches_jax.scores import parts, scorer
from ches_jax.scores import run as score_run
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.forward import ForwardPass, fetch
from ches_jax.scores.run import merge, score
from ches_jax.scores.table import FILE_NAME, read_table
from ches_jax.types import Eos, Response, TokenPair
from tests.helpers import one_sequence, write_lines

ROWS = 24


def columns(out):
    return read_table(out)[0].to_pydict()


def token_pairs(model, limit=ROWS, max_length=512, eos: Eos = "include"):
    rows = list(open_pairs(str(bundled.pairs_file())))
    step = len(rows) // limit  # the file is ordered by category
    return PairTokenizer(load_tokenizer(model), max_length, eos)(rows[::step][:limit])


def reference(model, pair, eos):
    """The definition, written out: one sequence at a time."""
    sums, last, logps = [], [], []
    for response in (pair.chosen, pair.rejected):
        ids = [*pair.prompt, *response.content]
        hidden, table = one_sequence(model, ids)
        targets = response.targets(eos)
        predicting = np.arange(len(pair.prompt) - 1, len(pair.prompt) - 1 + len(targets))
        sums.append(hidden[predicting].sum(0))
        last.append(hidden[len(ids) - 1])
        logps.append(table[predicting, targets].sum())
    return sums, last, logps


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), pytest.param("float32", 1e-5, marks=pytest.mark.slow)]
)
def test_scores_equal_the_definition_one_sequence_at_a_time(tiny_model, tmp_path, dtype, tolerance):
    out = score(
        ScoreConfig(model=str(tiny_model), out=str(tmp_path / "run"), dtype=dtype, logps=True, limit=60), quiet=True
    )
    got = columns(out)
    pairs = PairTokenizer(load_tokenizer(tiny_model), 512)(list(open_pairs(str(bundled.pairs_file())))[:60:5])
    with jax.enable_x64(dtype == "float64"):
        model = load_model(tiny_model, dtype=dtype)
        for pair in pairs:
            (plus, minus), (last_plus, last_minus), (logp_chosen, logp_rejected) = reference(model, pair, "include")
            i = pair.index
            scale = plus @ plus
            n, m = len(pair.chosen.targets("include")), len(pair.rejected.targets("include"))
            assert got["row_id"][i] == pair.row_id
            assert (got["chosen_tokens"][i], got["rejected_tokens"][i]) == (n, m)
            for name, expected, unit in [
                ("ches", plus @ minus - plus @ plus, scale),
                ("ln_ches", plus @ minus / (n * m) - plus @ plus / n**2, scale / n**2),
                ("inner", plus @ minus, scale),
                ("sqnorm_chosen", plus @ plus, scale),
                ("sqnorm_rejected", minus @ minus, minus @ minus),
                ("last_hidden_inner", last_plus @ last_minus, last_plus @ last_plus),
                ("cosine", plus @ minus / np.sqrt(plus @ plus * (minus @ minus)), 1.0),
                ("logp_chosen", logp_chosen, abs(logp_chosen)),
                ("logp_rejected", logp_rejected, abs(logp_rejected)),
            ]:
                assert abs(got[name][i] - expected) <= tolerance * unit, (name, i)


def numbers_of(model, pairs, *, length, rows_per_batch=2, mesh="data=1", passes={}):  # noqa: B006
    """ches / |S+|^2 of each pair, computed packed; compiled passes are kept between calls."""
    key = (id(model), mesh)
    if key not in passes:
        passes[key] = ForwardPass(model, make_mesh(mesh))
    run = passes[key]
    shards = run.mesh.shape["data"]
    out = np.zeros(len(pairs))
    for rows, placements in pack(
        pairs, length=length, rows_per_batch=rows_per_batch, row_multiple=shards, eos="include"
    ):
        s = fetch(run(rows))
        for p in placements:
            plus, minus = (s.sums[p.row, p.shared] + s.sums[p.row, side] for side in (p.chosen, p.rejected))
            out[p.pair] = (plus @ minus - plus @ plus) / (plus @ plus)
    return out


@pytest.fixture(scope="module")
def pairs_and_truth(tiny_model):
    model = load_model(tiny_model)
    pairs = token_pairs(tiny_model)
    # one-token responses, a long one, and equal ones besides the world's own
    pairs += [
        TokenPair(row_id="one", index=100, prompt=(5, 6), chosen=Response((7,), 2), rejected=Response((8,), 2)),
        TokenPair(row_id="bare", index=101, prompt=(5,), chosen=Response((7,), None), rejected=Response((8, 9), 2)),
        TokenPair(
            row_id="long",
            index=102,
            prompt=tuple(range(3, 90)),
            chosen=Response(tuple(range(9, 140)), 2),
            rejected=Response(tuple(range(9, 60)), 2),
        ),
        TokenPair(row_id="same", index=103, prompt=(5, 9), chosen=Response((7, 4), 2), rejected=Response((7, 4), 2)),
    ]
    return model, pairs, numbers_of(model, pairs, length=512)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_packing_padding_order_and_batch_size_never_change_a_score(pairs_and_truth, data):
    model, pairs, truth = pairs_and_truth
    order = data.draw(st.permutations(range(len(pairs))))
    chosen = order[: data.draw(st.integers(1, len(pairs)))]
    length = data.draw(st.sampled_from([64, 256, 512]))
    got = numbers_of(model, [pairs[i] for i in chosen], length=length, rows_per_batch=2 * 512 // length)
    np.testing.assert_allclose(got, truth[chosen], atol=1e-5)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hundreds_of_orders_packings_batches_and_meshes_give_the_score_of_float64(pairs_and_truth, truth64, data):
    model, pairs, _ = pairs_and_truth
    order = data.draw(st.permutations(range(len(pairs))))
    chosen = order[: data.draw(st.integers(1, len(pairs)))]
    length = data.draw(st.sampled_from([64, 256]))
    mesh = data.draw(st.sampled_from(["data=1", "data=2", "data=4"]))
    got = numbers_of(model, [pairs[i] for i in chosen], length=length, rows_per_batch=512 // length, mesh=mesh)
    np.testing.assert_allclose(got, truth64[chosen], atol=1e-5)


@pytest.fixture(scope="module")
def truth64(pairs_and_truth, tiny_model):
    with jax.enable_x64(True):
        return numbers_of(load_model(tiny_model, dtype="float64"), pairs_and_truth[1], length=512)


def test_four_devices_give_the_scores_of_one(pairs_and_truth):
    model, pairs, truth = pairs_and_truth
    np.testing.assert_allclose(numbers_of(model, pairs, length=256, mesh="data=4"), truth, atol=1e-5)


def test_equal_responses_have_score_zero(pairs_and_truth):
    _, pairs, truth = pairs_and_truth
    assert abs(truth[[p.row_id for p in pairs].index("same")]) < 1e-6


def test_the_pass_compiles_once_per_row_length(tiny_model):
    model = load_model(tiny_model)
    run = ForwardPass(model, make_mesh("data=1"))
    for rows, _ in pack(token_pairs(tiny_model), length=64, rows_per_batch=1, eos="include"):
        run(rows)
    assert len(run.shapes) == len(set(run.shapes)) <= 3


def test_chunks_and_devices_change_nothing_and_the_order_is_the_input_order(tiny_model, tmp_path):
    first, second = (
        score(ScoreConfig(model=str(tiny_model), out=str(tmp_path / name), limit=50, **options), quiet=True)
        for name, options in [("a", {}), ("b", {"chunk_rows": 7, "mesh": "data=4", "batch_tokens": 512})]
    )
    a, b = columns(first), columns(second)
    assert a["index"] == b["index"] == list(range(50))
    assert a["row_id"] == b["row_id"]
    scale = np.array(a["sqnorm_chosen"])
    np.testing.assert_allclose(np.array(b["ches"]) / scale, np.array(a["ches"]) / scale, atol=1e-5)


class Killed(Exception):
    pass


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    config = ScoreConfig(model=str(tiny_model), chunk_rows=8, limit=40)
    whole = score(replace(config, out=str(tmp_path / "whole")), quiet=True)
    stopped = replace(config, out=str(tmp_path / "stopped"))
    calls = []
    write = parts.write_part

    def write_three(path, *args):
        if len(calls) == 3:
            raise Killed
        calls.append(path)
        write(path, *args)

    monkeypatch.setattr(parts, "write_part", write_three)
    with pytest.raises(Killed):
        score(stopped, quiet=True)
    assert not (tmp_path / "stopped" / FILE_NAME).exists()
    monkeypatch.setattr(parts, "write_part", write)
    with pytest.raises(RunError, match="--resume"):
        score(stopped, quiet=True)
    resumed = score(stopped, resume=True, quiet=True)
    assert (resumed / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    assert read_json(resumed / "run.json")["scored_this_time"] == 40 - 3 * 8
    assert score(stopped, resume=True, quiet=True) == resumed  # nothing left to do


def test_another_run_is_never_written_over(tiny_model, tmp_path):
    config = ScoreConfig(model=str(tiny_model), out=str(tmp_path / "run"), limit=4)
    score(config, quiet=True)
    before = (tmp_path / "run" / FILE_NAME).read_bytes()
    with pytest.raises(RunError, match=r"holds another run(.|\n)*limit|eos"):
        score(replace(config, eos="exclude"), resume=True, quiet=True)
    assert (tmp_path / "run" / FILE_NAME).read_bytes() == before


GOOD = {"prompt": "Do you agree?", "chosen": " Yes", "rejected": " No"}


def test_bad_rows_stop_the_run_or_are_dropped_or_kept(tiny_model, tmp_path):
    rows = [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "prompt": "a " * 3000}, {**GOOD, "rejected": " Never"}]
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    config = ScoreConfig(model=str(tiny_model), pairs=pairs, out=str(tmp_path / "error"))
    with pytest.raises(
        ChesError, match=r"2 of 4 rows(.|\n)*empty_chosen(.|\n)*prompt_too_long(.|\n)*--on-bad-row drop"
    ):
        score(config, quiet=True)
    assert not (tmp_path / "error").exists()

    dropped = score(replace(config, out=str(tmp_path / "drop"), on_bad_row="drop"), quiet=True)
    assert columns(dropped)["index"] == [0, 3]
    dropped_rows = [json.loads(line) for line in (dropped / "dropped.jsonl").read_text().splitlines()]
    assert [(t["index"], t["reasons"]) for t in dropped_rows] == [(1, ["empty_chosen"]), (2, ["prompt_too_long"])]
    assert read_json(dropped / "run.json")["counts"] == {"rows": 4, "kept": 2, "dropped": 2}

    kept = columns(score(replace(config, out=str(tmp_path / "keep"), on_bad_row="keep"), quiet=True))
    assert kept["flags"] == [[], ["empty_chosen"], ["prompt_too_long"], []]
    assert [c is None for c in kept["ches"]] == [False, True, True, False]
    assert kept["ches"][0] == columns(dropped)["ches"][0]


def test_resume_with_dropped_rows_goes_on_at_the_right_row(tiny_model, tmp_path, monkeypatch):
    rows = [{**GOOD, "chosen": "" if i % 3 else " Yes", "rejected": f" No {i}"} for i in range(20)]
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    config = ScoreConfig(model=str(tiny_model), pairs=pairs, out=str(tmp_path / "a"), on_bad_row="drop", chunk_rows=6)
    whole = score(config, quiet=True)
    again = replace(config, out=str(tmp_path / "b"))
    monkeypatch.setattr(score_run, "_finish", lambda *a: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        score(again, quiet=True)
    monkeypatch.undo()
    assert (score(again, resume=True, quiet=True) / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    assert (tmp_path / "b" / "dropped.jsonl").read_bytes() == (tmp_path / "a" / "dropped.jsonl").read_bytes()


def test_a_score_that_is_not_finite_names_its_row(tiny_model, tmp_path, monkeypatch):
    def infinite(statistics):
        out = fetch(statistics)
        out.sums[:] = np.inf
        return out

    monkeypatch.setattr(scorer, "fetch", infinite)
    with np.errstate(all="ignore"), pytest.raises(ChesError, match=r"row 0 \(row_id .*not finite"):
        score(ScoreConfig(model=str(tiny_model), out=str(tmp_path / "run"), limit=4), quiet=True)


def gradients_of_the_unembedding(model, pair, eos="include"):
    """d/dW of the log-probability of each response, by autodiff, one sequence at a time."""
    out = []
    for response in (pair.chosen, pair.rejected):
        targets = jnp.array(response.targets(eos))
        start = len(pair.prompt) - 1
        hidden = jnp.asarray(one_sequence(model, [*pair.prompt, *response.content])[0][start : start + len(targets)])

        @jax.jit
        @jax.grad
        def gradient(w, hidden=hidden, targets=targets):
            table = jax.nn.log_softmax(model.logit_transform(hidden @ w.T), axis=-1)
            return jnp.take_along_axis(table, targets[:, None], 1).sum()

        out.append(np.asarray(gradient(model.unembedding.astype(hidden.dtype))))
    return out


def test_the_head_score_is_the_gradients_inner_product_and_its_tokens_add_up(tiny_model, tmp_path):
    config = ScoreConfig(
        model=str(tiny_model), out=str(tmp_path / "run"), dtype="float64", limit=6, by="head_score", token_scores=True
    )
    out = score(config, quiet=True)
    got = columns(out)
    with jax.enable_x64(True):
        model = load_model(tiny_model, dtype="float64")
        for pair in PairTokenizer(load_tokenizer(tiny_model), 512)(list(open_pairs(str(bundled.pairs_file())))[:6:3]):
            plus, minus = gradients_of_the_unembedding(model, pair)
            expected = (plus * (minus - plus)).sum()
            np.testing.assert_allclose(got["head_score"][pair.index], expected, rtol=1e-10)
    tokens = pq.read_table(out / parts.TOKENS).to_pandas()
    for index, rows in tokens.groupby("index"):
        chosen = rows[rows.response == "chosen"].sort_values("position")
        assert list(chosen.position) == list(range(got["chosen_tokens"][index]))
        np.testing.assert_allclose(chosen.ches.sum(), got["ches"][index], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(chosen.head_score.sum(), got["head_score"][index], rtol=1e-9)


def test_two_processes_take_turns_and_merge_into_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    config = ScoreConfig(model=str(tiny_model), limit=40, chunk_rows=8)
    whole = score(replace(config, out=str(tmp_path / "one")), quiet=True)
    for number in (1, 0):
        monkeypatch.setattr(score_run, "start_run", lambda *_, number=number: Process(number, 2))
        out = score(replace(config, out=str(tmp_path / "two")), quiet=True)
        assert not (out / FILE_NAME).exists()
        if number == 1:
            with pytest.raises(RunError, match=r"parts are missing \(0, 2\)"):
                merge(out)
    assert (merge(out) / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    record, of_one = read_json(out / "run.json"), read_json(whole / "run.json")
    assert record["counts"] == {"rows": 40, "kept": 40, "dropped": 0}
    work = record["work"]  # of both: what one process does, they share
    assert work.keys() == of_one["work"].keys() and len(work["weight_bytes"]) == 2
    assert work["shared_positions"] == of_one["work"]["shared_positions"] > 0
    assert work["positions"] >= of_one["work"]["positions"] and 0 < work["padding"] < 1
    assert work["seconds"].keys() == of_one["work"]["seconds"].keys() and work["cpu_seconds"] > 0
    assert f"Cost: {work['positions']:,} positions computed" in report(out).read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_real_processes(tiny_model, tmp_path):
    """jax.distributed on one machine: the parts of both are the run of one."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    words = [sys.executable, "-m", "ches_jax", "score", "--model", str(tiny_model), "--chunk-rows", "32", "--quiet"]
    subprocess.run([*words, "--out", str(tmp_path / "one")], check=True, capture_output=True)
    two = [*words, "--out", str(tmp_path / "two"), "--distributed"]
    both = [subprocess.Popen([*two, f"localhost:{port},2,{i}"]) for i in range(2)]
    assert [p.wait(timeout=180) for p in both] == [0, 0]
    assert (merge(tmp_path / "two") / FILE_NAME).read_bytes() == (tmp_path / "one" / FILE_NAME).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_that_is_killed_takes_the_other_not_with_it(tiny_model, tmp_path, victim):
    """It ends its own chunks, the merge names what is missing, and the resumed run gives the bytes of one process.

    A chunk is a row, that no process has done all of its own before the other is killed.
    """

    def start(*more):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        words = [sys.executable, "-m", "ches_jax", "score", "--model", str(tiny_model), "--chunk-rows", "1", "--quiet"]
        words += ["--out", str(tmp_path / "two"), *more, "--distributed"]
        return [subprocess.Popen([*words, f"localhost:{port},2,{i}"], stderr=subprocess.PIPE) for i in range(2)]

    both = start()
    parts = tmp_path / "two" / "parts"
    until = time.monotonic() + 200
    while not any(int(p.stem.split("-")[-1]) % 2 == victim for p in parts.glob("part-*.parquet")):
        assert time.monotonic() < until and all(p.poll() is None for p in both)
        time.sleep(0.01)
    both[victim].kill()
    other = both[1 - victim]
    assert other.communicate(timeout=300)[1] == b"" and other.returncode == 0
    both[victim].communicate()
    with pytest.raises(RunError, match="missing"):
        merge(tmp_path / "two")
    again = start("--resume")
    assert [(p.communicate(timeout=400)[1], p.returncode) for p in again] == [(b"", 0)] * 2
    score(ScoreConfig(model=str(tiny_model), chunk_rows=1, out=str(tmp_path / "one")), quiet=True)
    assert (merge(tmp_path / "two") / FILE_NAME).read_bytes() == (tmp_path / "one" / FILE_NAME).read_bytes()


@pytest.mark.parametrize("family", ["llama", pytest.param("llama_tied", marks=pytest.mark.slow)])
@pytest.mark.parametrize("eos", ["exclude", pytest.param("include", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-9), pytest.param("float32", 1e-5, marks=pytest.mark.slow)]
)
def test_golden_models(shared, tmp_path, family, eos, dtype, tolerance):
    folder = shared / "golden" / family
    truth = json.loads((folder / "golden.json").read_text())["fp64"]["policy"]
    out = score(
        ScoreConfig(
            model=str(folder / "policy"),
            pairs=str(shared / "golden" / "pairs.jsonl"),
            out=str(tmp_path / "run"),
            eos=eos,
            dtype=dtype,
            logps=eos == "exclude",
            on_bad_row="keep",
        ),
        quiet=True,
    )
    got = {k: np.array(v) for k, v in columns(out).items() if k not in {"row_id", "flags", "category"}}
    prefix = "" if eos == "exclude" else "script_"
    scale = got["sqnorm_chosen"]
    assert (np.abs(got["ches"] - truth[f"{prefix}ches"]) <= tolerance * scale).all()
    ln_scale = scale / got["chosen_tokens"] ** 2
    assert (np.abs(got["ln_ches"] - truth[f"{prefix}ln_ches"]) <= tolerance * ln_scale).all()
    assert (np.abs(got["last_hidden_inner"] - truth["last_hidden_inner"]) <= tolerance * scale).all()
    if eos == "exclude":
        for side in ("chosen", "rejected"):
            np.testing.assert_allclose(got[f"logp_{side}"], truth[f"logp_{side}"], rtol=tolerance)


@pytest.mark.slow
def test_ten_kills_at_random_moments_end_in_the_same_bytes(tiny_model, tmp_path):
    """kill -9, ten times, then to the end: the same bytes as a run that was never stopped."""
    options = ["--model", str(tiny_model), "--chunk-rows", "8", "--batch-tokens", "512", "--quiet"]
    command = [sys.executable, "-m", "ches_jax", "score", *options]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    rng = np.random.default_rng(0)
    killed = [*command, "--out", str(tmp_path / "killed"), "--resume"]
    for _ in range(10):
        with subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(rng.uniform(3, 9))
            process.send_signal(signal.SIGKILL)
            assert "Error" not in process.communicate()[1]
    subprocess.run(killed, check=True, capture_output=True)
    assert (tmp_path / "killed" / FILE_NAME).read_bytes() == (tmp_path / "whole" / FILE_NAME).read_bytes()
