"""Hooks of JAX trainers: a bigram model whose log-probabilities are known, in loops that call as each trainer does."""

import sys
from types import ModuleType, SimpleNamespace

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
        on_train_step_end=lambda t, step, loss: calls.append(step),
        on_train_end=lambda t: calls.append("end"),
    )
    trainer = SimpleNamespace(model=START, train_steps=0)
    hooks = displacement_hooks(PAIRS, logits_of, out=tmp_path, every=2, then=other)
    hooks.on_train_start(trainer)
    trainer.model = FALLEN
    for step in range(1, 6):
        hooks.on_train_step_end(trainer, step, 0.5)
    trainer.train_steps = 5
    hooks.on_train_end(trainer)
    assert calls == ["start", 1, 2, 3, 4, 5, "end"]
    check(tmp_path, [0, 2, 4, 5])


def test_a_log_refuses_what_it_cannot_compare(tmp_path):
    with pytest.raises(ChesError, match="stop_if fallen: expected some of dlogp_chosen"):
        PairLog(tmp_path, stop_if={"fallen": 1.0})
    log = PairLog(tmp_path)
    log.add(0, np.zeros((4, 2)), np.ones((4, 2)))
    with pytest.raises(ChesError, match=r"expected \[4, 2\]"):
        log.add(1, np.zeros((3, 2)), np.ones((3, 2)))
    with pytest.raises(ChesError, match="step 1: 1 log-probabilities are NaN"):
        log.add(1, np.array([[np.nan, 0], [0, 0], [0, 0], [0, 0]]), np.ones((4, 2)))
