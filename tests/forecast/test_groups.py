"""Groups: rates against derivatives and kernels, and the pair as the group of two."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.cli import main
from ches_jax.data.packing import Candidates
from ches_jax.errors import ChesError
from ches_jax.forecast.config import GroupsConfig
from ches_jax.forecast.group_run import GROUPS, group_updates, groups
from ches_jax.forecast.group_summary import summarise
from ches_jax.forecast.groups import GroupRates, HeadKernel, nthr
from ches_jax.forecast.metric import Metric
from ches_jax.forecast.passes import Measure, Pull
from ches_jax.models.checkpoint.load import load_model
from ches_jax.runs.directory import read_json
from tests.helpers import one_sequence

BAR = SimpleNamespace(update=lambda n: None)


@pytest.fixture(scope="module")
def group(exact):
    """Three responses to one prompt, one of them twice, and coefficients."""
    first, second = exact[0].run.pairs.train[:2]
    responses = (first.chosen, first.rejected, second.chosen, first.rejected)
    return Candidates(first.prompt, responses, 4), np.array([0.5, -0.2, 0.0, -0.4])


@pytest.mark.slow
def test_the_pair_is_the_group_of_two(exact):
    """Frozen updates of groups (beta, -beta) under RLOO's coefficients: those of DPO at the reference."""
    passes, direction, _ = exact
    run = passes.run
    with jax.enable_x64(True):
        pairs = run.pairs.train
        items = [Candidates(p.prompt, (p.chosen, p.rejected), 2) for p in pairs]
        found = SimpleNamespace(items=items, coefficients=[np.array([0.05, -0.05])] * len(items), groups=[])
        metric = Metric(run.config.optimizer, run.config.optimizer_args, run.schedule)
        pull = Pull(passes.model, passes.rows)
        moved = group_updates(found, run.plan, metric, pull, passes.params, run.config.clip, BAR)  # type: ignore[arg-type]
        for name, expected in direction.items():
            # RMSProp divides by the gradient's own size: rounding of it may count ten times, not more
            np.testing.assert_allclose(moved[name], expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())


def test_rates_are_the_derivatives_along_the_groups_own_step(exact, group):
    passes, (item, c) = exact[0], group
    with jax.enable_x64(True):
        rates = GroupRates(passes.model, passes.rows, passes.rows)(passes.params, item, c)
        step = Pull(passes.model, passes.rows)(passes.params, [item], [c])
        measure, eps = Measure(passes.model, passes.rows), 1e-7
        after, before = (
            measure({k: p + sign * eps * step[k] for k, p in passes.params.items()}, [item])[0] for sign in (1, -1)
        )
        np.testing.assert_allclose(rates.total, (after - before) / (2 * eps), rtol=1e-5)
        # equal responses have equal rates, whatever their coefficients; their parts differ
        assert rates.total[1] == pytest.approx(rates.total[3], rel=1e-12)
        assert rates.own[1] == pytest.approx(rates.own[3] / 2, rel=1e-12) and rates.own[2] == 0.0
        # of two equal losers each has from the other what that has from itself
        assert rates.losers[1] == pytest.approx(rates.own[3], rel=1e-9)
        assert rates.winners[0] == pytest.approx(0.0, abs=1e-12 * abs(rates.own[0]))


@pytest.mark.slow
def test_rates_of_adapters_are_those_of_the_weights_gradients_through_them(exact, passes_of, group):
    """With B = 0 the gradient of ln pi by B is scale * G A^T, G that by the weight; that by A is 0."""
    passes, (item, c) = exact[0], group
    with jax.enable_x64(True):
        low = passes_of(lora_rank=2, lora_alpha=6.0, lora_targets="q,down")
        rates = GroupRates(low.model, low.rows, low.rows)(low.params, item, c)
        pull = Pull(passes.model, passes.rows)
        of = [pull(passes.params, [Candidates(item.prompt, (r,), 1)], [np.ones(1)]) for r in item.responses]
    down = {name.removesuffix(".lora_a"): np.asarray(a) for name, a in low.params.items() if name.endswith(".lora_a")}
    assert {name.rsplit(".", 1)[-1] for name in down} == {"q_proj", "down_proj"}
    through = [[3.0 * np.einsum("loi,lri->lor", g[f"{n}.weight"], a) for n, a in down.items()] for g in of]
    parts = np.array([np.concatenate([x.ravel() for x in one]) for one in through])
    np.testing.assert_allclose(rates.total, parts @ parts.T @ c, rtol=1e-9)
    np.testing.assert_allclose(rates.own, np.diag(parts @ parts.T) * c, rtol=1e-9)


def test_the_head_kernel_is_that_of_unembedding_gradients(exact, group):
    """Explicit residuals times states, [V, D] for each response; NTHR summed over a losing response's tokens."""
    passes, (item, c) = exact[0], group
    with jax.enable_x64(True):
        model = load_model(passes.run.model.directory, dtype="float64", param_dtype="float64")
        (kernel,) = HeadKernel(passes.model, passes.rows)(passes.params, [item])
        gradients = []
        for response in item.responses:
            ids, targets = (*item.prompt, *response.content), response.targets("include")
            hidden, table = one_sequence(model, ids)
            at = slice(len(item.prompt) - 1, len(ids))
            residual = np.eye(table.shape[1])[list(targets)] - np.exp(table[at])
            gradients.append((residual.T @ hidden[at]).ravel())
    a = np.array(gradients)
    np.testing.assert_allclose(kernel, a @ a.T, rtol=1e-8, atol=1e-8 * np.abs(a @ a.T).max())
    np.testing.assert_allclose(nthr(kernel, c), [np.nan, a[0] @ a[1], np.nan, a[0] @ a[1]], rtol=1e-8)


def test_nthr_of_a_loser_sums_over_all_winners():
    kernel = np.array([[4.0, 1.0, 2.0], [1.0, 5.0, 3.0], [2.0, 3.0, 6.0]])
    assert np.array_equal(nthr(kernel, np.array([0.5, 0.25, -0.75])), [np.nan, np.nan, 5.0], equal_nan=True)


def test_a_response_without_advantage_is_in_no_set():
    numbers = ("coefficient", "forecast", "rate", "rate_own", "rate_winners", "rate_losers", "head_rate")
    columns = {name: [0.5, -0.5, 0.0] for name in numbers}
    table = pa.table({**columns, "group": [0, 0, 1], "falls": [False] * 3})
    found = summarise(table, GroupsConfig(groups="rollouts.jsonl"), "reward", 1)
    assert {name: one["responses"] for name, one in found["sets"].items()} == {"winners": 1, "losers": 1}
    assert found["groups_without_advantage"] == 1


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """Three groups as verl writes them; the second has equal rewards."""
    rows = [
        {"input": f"{n} + {n}? ", "output": f" {n + k}", "score": float(k == n and n != 2), "step": 1}
        for k in range(3) for n in (1, 2, 0)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("rollouts") / "1.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def finished(rollouts, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("groups") / "run"
    config = GroupsConfig(
        groups=str(rollouts), model=str(tiny_model), batch_size=2, lr=1e-4, mesh="data=1", batch_tokens=64, out=str(out)
    )
    return groups(config, quiet=True), config


def test_every_response_has_a_row_and_the_summary_counts_them(finished):
    out, _ = finished
    table, summary = pq.read_table(out / GROUPS), read_json(out / "run.json")["summary"]
    assert table.num_rows == 9 and table["group"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert table["index"].to_pylist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    column = {n: table[n].to_numpy(zero_copy_only=False) for n in table.schema.names}
    parts = column["rate_own"] + column["rate_winners"] + column["rate_losers"]
    np.testing.assert_allclose(parts, column["rate"], rtol=1e-9, atol=1e-12)
    equal = column["group"] == 1
    assert not column["coefficient"][equal].any() and not column["rate"][equal].any()
    assert column["forecast"][equal].any()  # other groups move it all the same
    np.testing.assert_allclose(column["coefficient"], column["advantage"] / (3 * column["tokens"]))
    assert summary["groups_without_advantage"] == 1 and summary["sets"]["winners"]["responses"] == 2
    assert np.array_equal(column["falls"], (column["coefficient"] > 0) & (column["rate"] < 0))
    assert [n is None for n in table["nthr"].to_pylist()] == (column["coefficient"] >= 0).tolist()
    assert not (out / "parts").exists()


def two(first, second, **more):
    """Two responses to one prompt, with rewards."""
    rewards = {"reward": 1} if more.get("equal") else {}
    rows = [{"prompt": "p? ", "response": r, **rewards} for r in (first, second)]
    return rows if more.get("equal") or more.get("bare") else [{**r, "reward": n} for n, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (two(" a", " b", bare=True), [], "not known which responses won"),
        (two(" a", " b", equal=True), [], "rewards are equal within each of its 1"),
        (two(" a", ""), [], "the chosen response is empty"),
        (two(" a", " b"), ["--optimizer", "adafactor"], "its metric is not known"),
        (two(" a", " b"), ["--lr", "0"], "--lr 0.0: expected a positive number"),
        (two(" a", " b"), ["--lora-rank", "0"], "--lora-rank 0: expected a positive number"),
        (two(" a", " b"), ["--lora-alpha", "2"], "belongs to --lora-rank"),
        (two(" a", " b"), ["--lora-rank", "2", "--lora-targets", "qq"], "qq"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tiny_model, tmp_path, capsys, rows, options, message):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["groups", "--groups", str(path), "--model", str(tiny_model), "--out", str(tmp_path / "run"), *options]
    assert main(words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_adapters_moves_them_alone(rollouts, tiny_model, tmp_path, finished):
    options = {**vars(finished[1]), "lora_rank": 2, "out": str(tmp_path / "run"), "optimizer": "sgd", "lr": 0.1}
    low, whole = GroupsConfig(**options), GroupsConfig(**{**options, "lora_rank": None, "out": str(tmp_path / "whole")})
    tables = [pq.read_table(groups(one, quiet=True) / GROUPS) for one in (low, whole)]
    assert tables[0]["logp"].equals(tables[1]["logp"]) and tables[0]["head_rate"].equals(tables[1]["head_rate"])
    own = [np.abs(t["rate_own"].to_numpy()) for t in tables]
    assert ((own[0] < own[1]) | (own[1] == 0)).all() and own[0].any()


def test_a_finished_run_is_taken_as_it_is_and_another_one_is_refused(finished):
    out, config = finished
    before = (out / GROUPS).read_bytes()
    assert groups(config, resume=True, quiet=True) == out and (out / GROUPS).read_bytes() == before
    with pytest.raises(ChesError):
        groups(GroupsConfig(**{**vars(config), "objective": "rloo"}), resume=True, quiet=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    from ches_jax.forecast import group_run

    out, config = finished
    write = group_run.write_table
    monkeypatch.setattr(group_run, "CHUNK", 1)

    def stop_at_the_third(path, table):
        if path.name == "part-000002.parquet":
            raise KeyboardInterrupt
        return write(path, table)

    again = GroupsConfig(**{**vars(config), "out": str(tmp_path / "run")})
    monkeypatch.setattr(group_run, "write_table", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        groups(again, quiet=True)
    monkeypatch.setattr(group_run, "write_table", write)
    monkeypatch.setattr(group_run, "group_updates", None)  # what is there is not computed again
    groups(again, resume=True, quiet=True)
    assert pq.read_table(tmp_path / "run" / GROUPS).equals(pq.read_table(out / GROUPS))
