"""Batches that are computed side by side give what they give one after the other, and fail as they do."""

import threading

import numpy as np
import pytest

from ches_jax.data.packing import PackedBatch
from ches_jax.distributed import under_way
from ches_jax.distributed.mesh import make_mesh
from ches_jax.distributed.under_way import UnderWay
from ches_jax.errors import ChesError
from ches_jax.models.checkpoint.load import load_model
from ches_jax.scores.forward import ForwardPass, Outputs
from ches_jax.scores.scorer import Batching, PairScorer
from ches_jax.types import Response, TokenPair


def pairs(count: int) -> list[TokenPair]:
    rng = np.random.default_rng(0)

    def some(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, 90, rng.integers(2, most)).tolist())

    return [
        TokenPair(row_id=str(i), index=i, prompt=some(30), chosen=Response(some(20), 2), rejected=Response(some(20), 2))
        for i in range(count)
    ]


def scorer(model, monkeypatch, cores: int) -> PairScorer:
    monkeypatch.setattr(under_way, "_cores", lambda: cores)
    run = ForwardPass(load_model(model), make_mesh("data=1"), Outputs(logps=True))
    return PairScorer(run, Batching.of(64, 64, run, None), "include")


def test_the_numbers_are_the_same_to_the_bit(tiny_model, monkeypatch):
    one, many = (scorer(tiny_model, monkeypatch, cores) for cores in (1, 4))
    assert (one.under_way.count, many.under_way.count) == (1, 4)
    (expected, _), (found, _) = one(pairs(40)), many(pairs(40))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert one.counted.facts() == many.counted.facts()


def test_a_batch_that_fails_is_reported(tiny_model, monkeypatch):
    failing = scorer(tiny_model, monkeypatch, 2)
    real = failing.run.prepared

    def prepared(rows: PackedBatch, before=None):
        def fail():
            raise ChesError("out of device memory")

        return fail if (rows.tokens == pairs(40)[7].prompt[0]).any() else real(rows, before)

    monkeypatch.setattr(failing.run, "prepared", prepared)
    with pytest.raises(ChesError, match="out of device memory"):
        failing(pairs(40))


def test_two_are_computed_at_the_same_time(monkeypatch):
    monkeypatch.setattr(under_way, "_cores", lambda: 2)
    start = UnderWay(make_mesh("data=1"))
    both = threading.Barrier(2, timeout=60)
    results = [start(lambda i=i: (both.wait(), i)[1]) for i in range(2)]
    assert [result() for result in results] == [0, 1]


def test_several_devices_are_launched_from_one_thread(monkeypatch):
    monkeypatch.setattr(under_way, "_cores", lambda: 8)
    start = UnderWay(make_mesh("data=2"))
    assert start.count == 1
    assert start(threading.current_thread)() is threading.current_thread()
