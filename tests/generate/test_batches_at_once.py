"""Batches of texts that are made side by side are those made one after the other, and fail as they do."""

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ches_jax.distributed import under_way
from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import ChesError
from ches_jax.generate.engine import Engine
from ches_jax.generate.packing import Request
from ches_jax.generate.sampling import Sampling, key_data
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import Decoder
from ches_jax.runs.work import Work

NEW = 40
LENGTHS = (3, 30, 9, 28, 17, 33, 5, 61, 12)
"""Of two buckets: in batches of two, three batches of one shape and two of another."""


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Decoder:
    return load_model(tiny_model)


def requests(new: int = NEW) -> list[Request]:
    rng = np.random.default_rng(1)
    return [Request(rng.integers(3, 1291, n).tolist(), key_data(0, f"{i}", 0), new) for i, n in enumerate(LENGTHS)]


def engine_of(model: Decoder, cores: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Engine:
    monkeypatch.setattr(under_way, "_cores", lambda: cores)
    options = {"sampling": Sampling(), "max_new_tokens": NEW, "stop_ids": range(0, 1291, 40)} | options
    engine = Engine(model, make_mesh("data=1"), **options)
    assert engine.under_way.count == min(cores, 4)
    return engine


def assert_the_same(model: Decoder, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], **options: Any) -> None:
    """Texts to the bit, and all that the engine counts and reports, in order."""
    found = []
    for cores in counts:
        engine = engine_of(model, cores, monkeypatch, **options)
        reported: list[int] = []
        made = engine(requests(), 2, reported.append)
        texts = [(m.tokens, m.logps.tobytes(), m.ended) for m in made]
        found.append((texts, reported, list(engine.shapes), engine.counted.facts()))
        assert len({len(m.tokens) for m in made}) > 2 and sum(m.ended for m in made) > 0
        assert reported == [2, 2, 2, 2, 1] and [s.bucket for s in engine.shapes] == [32, 64]
    assert all(one == found[0] for one in found)


def test_texts_are_the_same_to_the_bit(model: Decoder, monkeypatch):
    assert_the_same(model, monkeypatch, (1, 2, 4))


def test_texts_with_stop_strings_are_the_same_and_one_thread_at_a_time_looks_for_them(model: Decoder, monkeypatch):
    alone = threading.Lock()
    looks = []

    def stopped(prompt, tokens) -> bool:
        assert alone.acquire(blocking=False), "two threads at once"
        looks.append(threading.get_ident())
        threading.Event().wait(0.001)  # another thread may come
        alone.release()
        return any(t % 7 == 0 for t in tokens)

    assert_the_same(model, monkeypatch, (1, 4), stop_check=stopped)
    assert len(set(looks)) > 1


def test_double_precision_stays_double_in_other_threads(x64, tiny_model: Path, monkeypatch):
    exact = load_model(tiny_model, param_dtype="float64", dtype="float64")
    assert_the_same(exact, monkeypatch, (1, 2))
    (made, *_) = engine_of(exact, 2, monkeypatch)(requests(), 2)
    assert (made.logps != made.logps.astype(np.float32)).any()


def test_each_shape_is_compiled_once(model: Decoder, monkeypatch):
    engine = engine_of(model, 2, monkeypatch, max_new_tokens=13)  # a number of which no other test has programs
    work = Work()
    engine(requests(13), 2)
    assert work.facts()["programs"] == 2 * 2, "prompts and steps, of two shapes"
    engine(requests(13), 2)
    assert work.facts()["programs"] == 2 * 2


def test_one_token_needs_no_program_of_steps(model: Decoder, monkeypatch):
    engine = engine_of(model, 2, monkeypatch, max_new_tokens=11)
    work = Work()
    assert {len(m.tokens) for m in engine(requests(1), 2)} == {1}
    assert work.facts()["programs"] == 2
    assert {len(m.tokens) for m in engine(requests(2), 2)} <= {1, 2}  # now some do


class Watched:
    """Stands around an engine's programs: calls ``before`` with the number of a batch, in the order they begin."""

    def __init__(self, engine: Engine, before: Any, monkeypatch: pytest.MonkeyPatch):
        real, lock = engine._run, threading.Lock()
        self.begun = self.now = self.most = 0

        def run(*args: Any) -> Any:
            with lock:
                number, self.begun, self.now = self.begun, self.begun + 1, self.now + 1
                self.most = max(self.most, self.now)
            try:
                before(number)
                return real(*args)
            finally:
                with lock:
                    self.now -= 1

        monkeypatch.setattr(engine, "_run", run)


def test_two_batches_are_made_at_a_time_and_no_more(model: Decoder, monkeypatch):
    engine = engine_of(model, 2, monkeypatch)
    both = threading.Barrier(2, timeout=60)
    watched = Watched(engine, lambda number: both.wait() if number < 2 else None, monkeypatch)
    engine(requests(), 2)
    assert (watched.begun, watched.most) == (5, 2)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"), ChesError, "2 rows x 32 .* lower --batch-size"),
        (jax.errors.JaxRuntimeError("INTERNAL: else"), jax.errors.JaxRuntimeError, "INTERNAL"),
        (ValueError("no such text"), ValueError, "no such text"),
    ],
)
def test_an_error_of_a_batch_is_raised_and_ends_the_rest(model: Decoder, monkeypatch, cores, error, kind, words):
    engine = engine_of(model, cores, monkeypatch)
    failed, made = threading.Event(), []

    def before(number: int) -> None:
        if number == 1:
            failed.set()
            raise error
        if number == 0 and cores > 1:
            assert failed.wait(60), "the second is begun while the first is made"

    watched = Watched(engine, before, monkeypatch)
    with pytest.raises(kind, match=words):
        engine(requests(), 2, made.append)
    assert made == [2] and [s.bucket for s in engine.shapes] == [32], "the first batch counts"
    assert watched.begun < 5, "the last batch is not begun"
