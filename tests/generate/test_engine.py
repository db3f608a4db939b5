"""Tokens of batches: against transformers, against one row at a time, and wherever the rows lie."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from ches_jax.distributed.mesh import make_mesh
from ches_jax.generate.engine import Engine, runs_apart
from ches_jax.generate.packing import Request, arrays
from ches_jax.generate.sampling import Sampling, key_data
from ches_jax.hf.directory import read_config
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import FAMILIES, decoder_config
from tests.golden import TEXT
from tests.models.rows import ROWS, Row
from tests.models.test_parity import EAGER, make

LENGTHS = (7, 31, 20, 2, 13)
NEW = 20
WITHOUT_GOLDEN = ("gemma3_text", "glm4_moe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_next")
"""Families of which ``../shared/golden`` has no text model."""
TIE = 1e-4
"""Two logits closer than this, of logits around 10 in float32, may come out in either order."""


def prompts_for(vocabulary: int, lengths=LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, vocabulary, n).tolist() for n in lengths]


def requests_for(prompts: list[list[int]], new: int = NEW, seed: int = 0) -> list[Request]:
    return [Request(p, key_data(seed, f"row {i}", 0), new) for i, p in enumerate(prompts)]


def continued(theirs: Any, prompt: list[int], new: int, stop: int) -> tuple[tuple[int, ...], list[float]]:
    """Tokens that transformers makes greedily of a prompt alone, and how far the best logit was ahead each time."""
    with torch.no_grad():
        actual = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=0,
            eos_token_id=stop,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = [torch.topk(x[0].double(), 2).values for x in actual.logits]
    return tuple(actual.sequences[0, len(prompt) :].tolist()), [float(b[0] - b[1]) for b in best]


def equal_but_for_ties(ours: tuple[int, ...], theirs: tuple[int, ...], lead: list[float]) -> bool:
    """Equal tokens; or equal up to one where the two best logits are the same to rounding, after which texts part."""
    if ours == theirs:
        return True
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    return lead[first] < TIE


def check_against_transformers(directory: Path, batch_sizes: tuple[int, ...], mesh) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **EAGER).eval()
    model = load_model(directory)
    stop = 1
    engine = Engine(model, mesh, sampling=Sampling(0), max_new_tokens=NEW, stop_ids=(stop,))
    requests = requests_for(prompts_for(model.config.vocab_size))
    expected = [continued(theirs, list(a.prompt), NEW, stop) for a in requests]
    for rows in batch_sizes:
        for made, (tokens, lead) in zip(engine(requests, rows), expected, strict=True):
            assert equal_but_for_ties(made.tokens, tokens, lead), (rows, made.tokens, tokens)
            assert made.ended == (tokens[-1] == stop)


@pytest.mark.parametrize(
    "name",
    ["models/stories260K", "golden/gemma2/policy", pytest.param("models/hh-tiny/fp32", marks=pytest.mark.slow)],
)
def test_greedy_tokens_are_those_of_transformers(shared: Path, name: str, mesh):
    check_against_transformers(shared / name, (4,), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("family", TEXT)
def test_greedy_tokens_are_those_of_transformers_in_every_family(shared: Path, family: str, mesh):
    check_against_transformers(shared / "golden" / family / "policy", (1, 4), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=row.family) for row in ROWS if row.family in WITHOUT_GOLDEN])
def test_greedy_tokens_are_those_of_transformers_in_families_without_a_golden_directory(row: Row, tmp_path: Path, mesh):
    make(row, {}, tmp_path)
    check_against_transformers(tmp_path, (1, 4), mesh)


def test_greedy_tokens_are_checked_in_every_family(shared: Path):
    golden = {read_config(shared / "golden" / family / "policy")["model_type"] for family in TEXT}
    assert golden | set(WITHOUT_GOLDEN) == FAMILIES.keys() and not golden & set(WITHOUT_GOLDEN)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Decoder:
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def engine(model: Decoder, mesh) -> Engine:
    # a fifth of the vocabulary ends a text, so that texts end at different times
    return Engine(model, mesh, sampling=Sampling(), max_new_tokens=NEW, stop_ids=range(0, 1291, 5))


def test_texts_do_not_depend_on_batch_neighbours_order_or_number(engine: Engine):
    requests = requests_for(prompts_for(1291, (3, 30, 9, 28, 17, 33, 5, 31, 12)))
    together = [m.tokens for m in engine(requests, 4)]
    assert len(set(map(len, together))) > 3
    backwards = engine(requests[::-1], 4)[::-1]
    assert [m.tokens for m in backwards] == together
    assert [m.tokens for i in (2, 3) for m in engine(requests[i : i + 1], 1)] == together[2:4]
    again = engine([*requests[:2], *requests_for(prompts_for(1291, (9, 2)), seed=3)], 4)
    assert [m.tokens for m in again[:2]] == together[:2]
    assert {s.rows for s in engine.shapes} == {1, 4} and {s.bucket for s in engine.shapes} == {32, 64}


@pytest.mark.parametrize(("name", "parts"), [("data=1", 1), ("data=2", 2)])
def test_positions_are_those_of_packed_prompts_and_of_steps(model: Decoder, name: str, parts: int):
    """Each device has a stream of its own, and steps until its own longest text ends, whose last token is no input."""
    engine = Engine(model, make_mesh(name), sampling=Sampling(), max_new_tokens=NEW, stop_ids=range(0, 1291, 5))
    made = [len(m.tokens) - 1 for m in engine(requests_for(prompts_for(1291, (3, 9, 5))), 4)]
    assert len(set(made)) == 3
    rows = [[*made, 0][i : i + 4 // parts] for i in range(0, 4, 4 // parts)]  # the fourth row only fills the batch
    counted = engine.counted
    assert counted.computed == parts * 32 + sum(len(part) * max(part) for part in rows)
    assert counted.used == counted.apart == 3 + 9 + 5 + sum(made)
    one = Engine(model, make_mesh("data=1"), sampling=Sampling(), max_new_tokens=1)
    one(requests_for(prompts_for(1291, (40,)), new=1), 1)
    assert (one.counted.computed, one.counted.used) == (64, 40)  # the first token is the prompts' own pass's


def test_log_probabilities_are_those_of_one_pass_over_the_text(engine: Engine, model: Decoder):
    @nnx.jit
    def log_probs(model: Decoder, ids):
        return jax.nn.log_softmax(model.logits(model.hidden(ids)))

    requests = requests_for(prompts_for(1291))
    for ask, made in zip(requests, engine(requests, 4), strict=True):
        ids = np.zeros((1, 64), np.int32)
        both = [*ask.prompt, *made.tokens]
        ids[0, : len(both)] = both
        n = len(ask.prompt)
        exact = np.asarray(log_probs(model, jnp.asarray(ids)), np.float64)[0, n - 1 : len(both) - 1]
        np.testing.assert_allclose(made.logps, exact[np.arange(len(made.tokens)), made.tokens], atol=2e-5)


def test_ends_limits_and_the_rest_of_a_row(engine: Engine):
    requests = [
        Request(a.prompt, a.key, limit)
        for a, limit in zip(requests_for(prompts_for(1291)), (1, 2, 20, 20, 3), strict=True)
    ]
    actual = engine(requests, 4)
    for ask, made in zip(requests, actual, strict=True):
        stops = [t % 5 == 0 for t in made.tokens]
        assert 1 <= len(made.tokens) <= ask.limit and len(made.logps) == len(made.tokens)
        assert not any(stops[:-1]) and made.ended == stops[-1]
        assert made.ended or len(made.tokens) == ask.limit
    # a smaller limit gives the beginning of the same text
    longer = engine(requests_for(prompts_for(1291)), 4)
    assert all(long.tokens[: len(made.tokens)] == made.tokens for made, long in zip(actual, longer, strict=True))


def test_batches_are_full_and_have_one_shape_for_each_bucket(engine: Engine):
    requests = requests_for(prompts_for(1291, (40, 3, 33, 9, 50, 7, 2, 60, 5)))
    batches = list(engine.batches(requests, 2))
    assert [batch for _, batch in batches] == [[1, 3], [5, 6], [8, 0], [2, 4], [7]]
    shapes = [shape for shape, _ in batches]
    assert [s.bucket for s in shapes] == [32, 32, 64, 64, 64] and len(set(shapes)) == 2


def test_no_step_is_made_once_every_row_has_ended(engine: Engine):
    requests = [Request(a.prompt, a.key, 1) for a in requests_for(prompts_for(1291, (3, 9)))]
    ((shape, _),) = engine.batches(requests, 4)
    stream, prompts = jax.device_put(arrays(requests, shape, 1))
    state = engine._prefill(engine._state, stream, prompts)
    after = engine._decode(engine._state, engine._apart, prompts, state, jnp.int32(1), jnp.int32(NEW))
    assert after.count.tolist() == [1, 1, 0, 0]
    (only,) = after.cache  # one stack of layers
    assert not np.asarray(only.k)[:, :, :, 32:].any(), "nothing was written after the prompts"


@pytest.mark.parametrize("name", ["data=1", "data=2"])
@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        pytest.param("gpt2", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", marks=pytest.mark.slow),
        pytest.param("gemma4", marks=pytest.mark.slow),
        pytest.param("gpt_oss", marks=pytest.mark.slow),
        pytest.param("llama4", marks=pytest.mark.slow),
        pytest.param("phi3", marks=pytest.mark.slow),
    ],
)
def test_packed_prompts_make_the_texts_of_prompts_in_rows_of_their_own(
    x64, shared: Path, family: str, name: str, monkeypatch
):
    """One row of the stream and several, in one piece and in blocks; prompts of two buckets, one of them twice."""
    model = load_model(shared / "golden" / family / "policy", param_dtype="float64", dtype="float64")
    monkeypatch.setattr("ches_jax.generate.packing.LONGEST_ROW", 40)
    monkeypatch.setattr("ches_jax.generate.engine.LONGEST_DENSE", 48)
    prompts = prompts_for(400, (3, 30, 9, 28, 17, 33, 40))
    requests = requests_for([*prompts, prompts[1]], 6)
    made = {}
    for packs in (True, False):
        monkeypatch.setattr("ches_jax.generate.engine.packs_prompts", lambda config, packs=packs: packs)
        engine = Engine(model, make_mesh(name), sampling=Sampling(), max_new_tokens=6)
        made[packs] = engine(requests, 4)
        if packs and name == "data=1":
            assert [(s.bucket, s.stream_rows, s.stream_length) for s in engine.shapes] == [(32, 2, 40), (64, 2, 64)]
    for a, b in zip(made[True], made[False], strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logps, b.logps, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["data=1", "data=2"])
def test_layers_that_lie_apart_make_the_same_texts(engine: Engine, model: Decoder, name: str, monkeypatch):
    assert engine._apart is None, "a small model is not copied"
    monkeypatch.setattr("ches_jax.generate.engine.SMALLEST_APART", 0)
    apart = Engine(
        model,
        make_mesh(name),
        sampling=Sampling(),
        max_new_tokens=NEW,
        stop_ids=range(0, 1291, 5),
        stop_check=lambda prompt, tokens: False,  # the cache is put together and taken apart again every segment
    )
    assert apart._apart is not None and len(apart._apart) == model.config.num_layers
    requests = requests_for(prompts_for(1291))
    for a, b in zip(apart(requests, 4), engine(requests, 4), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logps, b.logps, atol=2e-5)


@pytest.mark.parametrize(("smallest", "largest", "expected"), [(0, 2**32, True), (2**30, 2**32, False), (0, 10, False)])
def test_small_and_very_large_layers_stay_stacked(model: Decoder, monkeypatch, smallest, largest, expected):
    monkeypatch.setattr("ches_jax.generate.engine.SMALLEST_APART", smallest)
    monkeypatch.setattr("ches_jax.generate.engine.LARGEST_APART", largest)
    assert runs_apart(model) == expected
    monkeypatch.setattr("ches_jax.generate.engine.platform", lambda: "tpu")
    assert not runs_apart(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    ["data=4", pytest.param("fsdp=4", marks=pytest.mark.slow), pytest.param("data=2,tensor=2", marks=pytest.mark.slow)],
)
def test_devices_change_no_text(engine: Engine, tiny_model: Path, words: str):
    from ches_jax.models.sharding import placement

    mesh = make_mesh(words)
    spread = Engine(
        load_model(tiny_model, sharding=placement(mesh)),
        mesh,
        sampling=Sampling(),
        max_new_tokens=NEW,
        stop_ids=range(0, 1291, 5),
    )
    requests = requests_for(prompts_for(1291))
    assert [m.tokens for m in spread(requests, 4)] == [m.tokens for m in engine(requests, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_ropes_that_depend_on_length_take_the_longest_a_row_can_become(tmp_path, kind: str, mesh):
    """All of a row rotates alike, as when the row is scored as long as that."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    raw = {
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "rope_parameters": rope,
    }
    if kind == "longrope":
        factors = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 3.0, 7.0]}
        raw |= {
            "model_type": "phi3",
            "original_max_position_embeddings": 24,
            "max_position_embeddings": 96,
            "rope_parameters": {**rope, **factors},
            "pad_token_id": 0,
        }
    model = Decoder(decoder_config(raw), rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda w: w * 8 if w.ndim > 1 else w, nnx.state(model)))
    requests = requests_for(prompts_for(101, (4, 15)))
    actual = Engine(model, mesh, sampling=Sampling(0), max_new_tokens=NEW)(requests, 2)
    step = nnx.jit(lambda m, ids, lengths: m.logits(m.hidden(ids, lengths=lengths)))
    for ask, made in zip(requests, actual, strict=True):
        ids = np.zeros((1, 48), np.int32)
        n = len(ask.prompt)
        ids[0, : n + NEW] = [*ask.prompt, *made.tokens]
        lengths = jnp.full((1, 48), n + NEW, jnp.int32)
        best = np.asarray(step(model, jnp.asarray(ids), lengths)).argmax(-1)[0, n - 1 : n + NEW - 1]
        assert tuple(best.tolist()) == made.tokens
