"""Hooks of JAX trainers: a bigram model whose log-probabilities are known, in loops that call as each trainer does."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.errors import ChesError
from ches_jax.integrations.arrays import HeldOutPairs
from ches_jax.integrations.easydel import watch_displacement
from ches_jax.integrations.levanter import displacement_hook
from ches_jax.integrations.maxtext import displacement_step
from ches_jax.integrations.pair_log import PairLog
from ches_jax.integrations.tunix import displacement_hooks

VOCABULARY = 7
TOKENS = [([1, 2], [3], [4, 5]), ([2], [6, 1, 3], [4]), *[([1], [k % 5 + 1], [3, 2]) for k in range(9)]]
PAIRS = HeldOutPairs.of(TOKENS)
START = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
FALLEN = START + np.random.default_rng(1).normal(size=START.shape).astype(np.float32)


def logits_of(matrix, ids):
    return matrix[ids]


def by_hand(matrix):
    """One token at a time, in double precision."""
    table = matrix.astype(np.float64)
    table = table - np.log(np.exp(table).sum(-1, keepdims=True))
    return np.array(
        [[sum(table[a, b] for a, b in zip([p[-1], *y[:-1]], y, strict=True)) for y in sides] for p, *sides in TOKENS]
    )


def check(folder, steps, start=START, end=FALLEN):
    table = pq.read_table(folder / "displacement.parquet").to_pandas()
    assert sorted(set(table.step)) == steps
    last = table[table.step == steps[-1]]
    expected = by_hand(end) - by_hand(start)
    assert last.dlogp_chosen.to_numpy() == pytest.approx(expected[:, 0], abs=1e-4)
    assert last.dlogp_rejected.to_numpy() == pytest.approx(expected[:, 1], abs=1e-4)
    assert last.rejected_tokens.tolist()[:2] == [2, 1]
    assert diagnose(DiagnoseConfig(path=str(folder))).chosen.mean == pytest.approx(expected[:, 0].mean(), abs=1e-4)


def test_responses_are_summed_from_their_first_token_and_padding_is_not():
    assert PAIRS.logps(lambda ids: START[ids], batch=4) == pytest.approx(by_hand(START), abs=1e-5)
    longer = HeldOutPairs.of(TOKENS, pad=6, length=9)
    assert longer.logps(lambda ids: START[ids]) == pytest.approx(by_hand(START), abs=1e-5)
    with pytest.raises(ChesError, match="the longest has 4 tokens, more than 3"):
        HeldOutPairs.of(TOKENS, length=3)
    with pytest.raises(ChesError, match="none of them empty"):
        HeldOutPairs.of([([1], [], [2])])


def test_maxtext_calls_after_its_steps(tmp_path):
    after_step = displacement_step(PAIRS, logits_of, out=tmp_path, every=2)
    assert after_step(0, START) is not None and after_step(1, FALLEN) is None
    found = after_step(2, FALLEN)
    assert found is not None and found["displacement/dlogp_chosen"] == pytest.approx(
        (by_hand(FALLEN) - by_hand(START))[:, 0].mean(), abs=1e-4
    )
    check(tmp_path, [0, 2])


def test_levanter_gives_its_step_info(tmp_path):
    logged = []
    hook = displacement_hook(PAIRS, logits_of, out=tmp_path, start=START, log=lambda found, step: logged.append(step))
    hook(SimpleNamespace(model=FALLEN, step=4, next_step=5))
    check(tmp_path, [0, 5])
    assert logged == [0, 5]


def test_easydel_keeps_its_own_hook_and_gets_the_numbers(tmp_path):
    calls = []

    def own(state, metrics, step):
        calls.append(step)
        return state, metrics

    trainer = SimpleNamespace(model_state=START, on_step_end=own)
    watch_displacement(trainer, PAIRS, logits_of, out=tmp_path, every=3)
    results = [trainer.on_step_end(FALLEN, {"loss": 1.0}, step) for step in range(1, 5)]
    assert calls == [1, 2, 3, 4] and [len(metrics) > 1 for _, metrics in results] == [False, False, True, False]
    assert results[2][1]["loss"] == 1.0
    metrics = SimpleNamespace(other_metrics={})
    trainer.on_step_end(FALLEN, metrics, 6)
    assert "displacement/lld_rate" in metrics.other_metrics
    check(tmp_path, [0, 3, 6])


def test_tunix_calls_its_hooks(tmp_path, monkeypatch):
    """The real class where tunix is installed, else one with its methods."""
    try:
        from tunix.sft.hooks import TrainingHooks  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        names = ("tunix", "tunix.sft", "tunix.sft.hooks")
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["tunix.sft.hooks"].TrainingHooks = object  # type: ignore[attr-defined]
    calls = []
    other = SimpleNamespace(
        on_train_start=lambda t: calls.append("start"),
        on_train_step_start=lambda t: None,
        on_train_step_end=lambda t, step, loss: calls.append(step),
        on_train_end=lambda t: calls.append("end"),
    )
    trainer = SimpleNamespace(model=START, train_steps=0)
    hooks = displacement_hooks(PAIRS, logits_of, out=tmp_path, every=2, then=other)
    tunix_loop(hooks, trainer, 5, by=(FALLEN - START) / 5)
    assert calls == ["start", 1, 2, 3, 4, "end"]
    check(tmp_path, [0, 2, 4, 5])
    table = pq.read_table(tmp_path / "displacement.parquet").to_pandas()
    after_two = by_hand(START + (FALLEN - START) * 2 / 5) - by_hand(START)
    assert table[table.step == 2].dlogp_chosen.to_numpy() == pytest.approx(after_two[:, 0], abs=1e-4)


def tunix_loop(hooks, trainer, until, by, micro_batches=2):
    """As ``PeftTrainer.train`` of tunix 0.1.7 calls: a step is reported when the next update has been made."""
    hooks.on_train_start(trainer)
    written = None
    while trainer.train_steps < until:
        for _ in range(micro_batches):
            hooks.on_train_step_start(trainer)
        trainer.model = trainer.model + by
        trainer.train_steps += 1
        if written is not None:
            hooks.on_train_step_end(trainer, written, 0.5)
        written = trainer.train_steps
    hooks.on_train_end(trainer)


def test_a_run_of_tunix_that_resumes_continues_its_log(tmp_path, monkeypatch):
    """Its trainer restores a checkpoint before the training begins: that is not the start of the run."""
    test_tunix_calls_its_hooks(tmp_path / "whole", monkeypatch)
    by = (FALLEN - START) / 5
    trainer = SimpleNamespace(model=START, train_steps=0)
    tunix_loop(displacement_hooks(PAIRS, logits_of, out=tmp_path / "parts", every=2), trainer, 3, by)
    tunix_loop(displacement_hooks(PAIRS, logits_of, out=tmp_path / "parts", every=2), trainer, 5, by)
    check(tmp_path / "parts", [0, 2, 3, 4, 5])


def test_easydel_begins_where_its_state_is(tmp_path):
    log = PairLog(tmp_path)
    log.add(0, by_hand(START), PAIRS.tokens)
    log.add(6, by_hand(START) - 1, PAIRS.tokens)
    state = SimpleNamespace(matrix=FALLEN, step=np.int32(4))
    trainer = SimpleNamespace(model_state=state, on_step_end=lambda state, metrics, step: (state, metrics))
    watch_displacement(trainer, PAIRS, lambda state, ids: state.matrix[ids], out=tmp_path, every=3)
    check(tmp_path, [0, 4])


class TestALogInADirectory:
    """Which evaluations it holds, and what its changes are counted from."""

    TOKENS = np.array([[3, 4], [5, 1], [2, 2]])
    LOGPS = np.array([[-9.0, -8.0], [-7.0, -6.0], [-5.0, -4.0]])

    def steps(self, folder):
        table = pq.read_table(folder / "displacement.parquet").to_pandas()
        return {int(step): float(rows.dlogp_chosen.mean()) for step, rows in table.groupby("step")}

    def add(self, log, step, by, tokens=TOKENS):
        return log.add(step, self.LOGPS[: len(tokens)] + by, tokens)["displacement/dlogp_chosen"]

    def test_a_step_that_comes_again_counts_once(self, tmp_path):
        log = PairLog(tmp_path)
        for step, by in ((0, 0.0), (0, 0.0), (4, -1.0), (8, -2.0), (8, -2.0)):
            self.add(log, step, by)
        assert self.steps(tmp_path) == {0: 0.0, 4: -1.0, 8: -2.0}
        assert diagnose(DiagnoseConfig(path=str(tmp_path))).pairs == 3

    def test_a_run_that_goes_back_replaces_what_came_after(self, tmp_path):
        log = PairLog(tmp_path)
        for step, by in ((0, 0.0), (4, -1.0), (8, -2.0), (4, -3.0)):
            self.add(log, step, by)
        assert self.steps(tmp_path) == {0: 0.0, 4: -3.0}
        self.add(log, 0, 5.0)  # a second training by the same trainer
        assert self.add(log, 2, 4.0) == -1.0 and self.steps(tmp_path) == {0: 0.0, 2: -1.0}

    def test_a_run_that_resumes_counts_from_its_start(self, tmp_path):
        first = PairLog(tmp_path)
        for step, by in ((0, 0.0), (4, -1.0), (8, -2.0)):
            self.add(first, step, by)
        again = PairLog(tmp_path)
        assert self.add(again, 6, -1.5) == -1.5 and self.add(again, 10, -4.0) == -4.0
        assert self.steps(tmp_path) == {0: 0.0, 4: -1.0, 6: -1.5, 10: -4.0}

    def test_a_run_that_starts_does_not(self, tmp_path):
        self.add(PairLog(tmp_path), 4, 0.0)
        self.add(PairLog(tmp_path), 0, 0.0)
        assert self.steps(tmp_path) == {0: 0.0}

    def test_other_pairs_are_refused(self, tmp_path):
        self.add(PairLog(tmp_path), 0, 0.0)
        with pytest.raises(ChesError, match=r"\[2, 2\]: expected \[3, 2\], the pairs of step 0 in .* are 3 pairs"):
            self.add(PairLog(tmp_path), 4, 0.0, self.TOKENS[:2])
        with pytest.raises(ChesError, match=r"of other lengths; .* give these, or another directory"):
            self.add(PairLog(tmp_path), 4, 0.0, self.TOKENS + 1)
        assert self.steps(tmp_path) == {0: 0.0}

    def test_a_log_without_a_start_says_so(self, tmp_path, caplog):
        """levanter's first call comes after an update; what is then counted from there is not taken for the run."""
        log = PairLog(tmp_path)
        self.add(log, 50, -1.0)
        assert "no measurement before update 50; changes are counted from there" in caplog.text
        with pytest.raises(ChesError, match="holds step 50 only; there is no change to judge yet"):
            diagnose(DiagnoseConfig(path=str(tmp_path)))
        self.add(log, 100, -3.0)
        found = diagnose(DiagnoseConfig(path=str(tmp_path)))
        assert found.chosen.mean == -2.0 and "update 100 against 50" in found.source

    def test_a_bound_stops_on_its_own_side(self, tmp_path):
        fallen = PairLog(tmp_path / "a", stop_if={"dlogp_chosen": -2.0, "lld_rate": 1.0})
        start, little, much = (fallen.add(i, self.LOGPS + by, self.TOKENS) for i, by in enumerate((0.0, -1.0, -3.0)))
        assert [fallen.stops(found) for found in (start, little, much)] == [False, False, True]
        risen = PairLog(tmp_path / "b", stop_if={"dlogp_chosen": 2.0})
        assert not risen.stops(much) and risen.stops({"displacement/dlogp_chosen": 2.5})
        bound: Any
        for bound in ({"lld_rate": 60}, {"lld_rate": -1.0}, {"margin": "1"}, {"margin": float("nan")}):
            with pytest.raises(
                ChesError, match=r"stop_if .*: (it is a share of the pairs; expected a bound from 0 to 1|ex)"
            ):
                PairLog(tmp_path, stop_if=bound)


def test_a_log_refuses_what_it_cannot_compare(tmp_path):
    with pytest.raises(ChesError, match="stop_if fallen: expected some of dlogp_chosen"):
        PairLog(tmp_path, stop_if={"fallen": 1.0})
    log = PairLog(tmp_path)
    log.add(0, np.zeros((4, 2)), np.ones((4, 2)))
    with pytest.raises(ChesError, match=r"expected \[4, 2\]"):
        log.add(1, np.zeros((3, 2)), np.ones((3, 2)))
    with pytest.raises(ChesError, match="step 1: 1 log-probabilities are NaN"):
        log.add(1, np.array([[np.nan, 0], [0, 0], [0, 0], [0, 0]]), np.ones((4, 2)))
