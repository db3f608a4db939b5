"""Entanglement of gradients by each estimator, against gradients that are written out in double precision."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import ChesError
from ches_jax.models.adapters.lora import ALL_LINEAR, adapted, adapter_shapes, initial_adapters, make_spec
from ches_jax.models.attention.mask import Visibility
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import abstract_decoder
from ches_jax.models.sharding import placement
from ches_jax.scores.config import ScoreConfig, parse_gradients
from ches_jax.scores.formulas import gradient_score
from ches_jax.scores.gradients import Gradients, Gram, band, cosine
from ches_jax.scores.run import score
from ches_jax.scores.table import read_table
from ches_jax.types import Response, TokenPair

PAIRS = [
    # both begin alike; one was cut; each has a prompt of its own
    TokenPair(row_id="a", index=0, prompt=(5, 6, 7), chosen=Response((8, 9, 10), 2), rejected=Response((8, 4), 2)),
    TokenPair(row_id="b", index=1, prompt=(12, 13), chosen=Response((14,), 2), rejected=Response((15, 16), None)),
    TokenPair(
        row_id="c", index=2, prompt=(5,), chosen=Response((20,), 2), rejected=Response((20,), 2), rejected_prompt=(9,)
    ),
]
LENGTH = 8


@pytest.fixture(scope="module")
def model(tiny_model):
    with jax.enable_x64(True):
        yield load_model(tiny_model, dtype="float64", param_dtype="float64")


@pytest.fixture(scope="module")
def written_out(model):
    """Gradients of ln pi of both responses of each pair by every parameter: one sequence, logits whole."""
    graph, state = nnx.split(model)

    def logp(state, tokens, asked, end):
        decoder = nnx.merge(graph, state)
        at = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        none = jnp.zeros_like(at)
        hidden = decoder.hidden(tokens[None], at, Visibility(none, none, none), none + LENGTH)
        table = jax.nn.log_softmax(jnp.einsum("td,vd->tv", hidden[0], decoder.unembedding, precision="highest"))
        of_next = jnp.take_along_axis(table[:-1], tokens[1:, None], 1)[:, 0]
        inside = (at[0, :-1] >= asked - 1) & (at[0, :-1] < end - 1)
        return jnp.sum(jnp.where(inside, of_next, 0.0))

    of_sequence = jax.jit(jax.grad(logp))

    def gradient(prompt, response):
        whole = (*prompt, *response.targets("include"))
        tokens = np.zeros(LENGTH, np.int32)
        tokens[: len(whole)] = whole
        found = of_sequence(state, tokens, len(prompt), len(whole))
        return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(found)}

    with jax.enable_x64(True):
        return [tuple(map(gradient, p.prompts, (p.chosen, p.rejected))) for p in PAIRS]


def gram_of(pairs) -> Gram:
    def inner(a, b):
        return sum(float(np.sum(np.asarray(a[name]) * np.asarray(b[name]))) for name in a)

    return Gram(*np.array([[inner(g, g), inner(h, h), inner(g, h)] for g, h in pairs]).T)


def found(model, spec, mesh="data=1") -> Gram:
    return Gradients(model, make_mesh(mesh), parse_gradients(spec), "include")(PAIRS)


def agrees(one: Gram, other: Gram) -> None:
    for name in Gram._fields:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_head_is_the_gradient_by_the_unembedding(model, written_out, x64):
    head = [tuple({"w": side["lm_head.weight"]} for side in pair) for pair in written_out]
    agrees(found(model, "head"), gram_of(head))


@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2"])
def test_devices_give_the_numbers_of_one(tiny_model, model, x64, mesh):
    """Each its own pairs, of which one stays idle at the end; or each pair together."""
    sharding = placement(make_mesh(mesh))
    sharded = load_model(tiny_model, dtype="float64", param_dtype="float64", sharding=sharding)
    agrees(found(sharded, "head", mesh), found(model, "head"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("spec", ["full", "lora,rank=3", "projected,directions=5"])
def test_every_estimator_on_several_devices(tiny_model, model, x64, mesh, spec):
    sharding = placement(make_mesh(mesh))
    sharded = load_model(tiny_model, dtype="float64", param_dtype="float64", sharding=sharding)
    agrees(found(sharded, spec, mesh), found(model, spec))


@pytest.mark.slow
def test_full_gradients_are_those_by_every_parameter(model, written_out, x64):
    agrees(found(model, "full"), gram_of(written_out))


@pytest.mark.slow
def test_adapters_see_the_gradient_through_what_they_draw(model, written_out, x64):
    r"""With B = 0 the gradient by A vanishes, and that by B is s G A^T, with G the gradient by the matrix."""
    spec = make_spec(3, 6.0, ALL_LINEAR, model.config)
    shapes = adapter_shapes(adapted(abstract_decoder(model.config, dtype=jnp.float64), spec, jnp.float64))
    drawn = initial_adapters(shapes, 5)

    def by_b(full):
        return {
            name: low.scale * np.einsum("loi,lri->lor", full[f"{name}.weight"], drawn[f"{name}.lora_a"])
            for name, low in spec.items()
        }

    agrees(found(model, "lora,rank=3,seed=5"), gram_of([tuple(map(by_b, pair)) for pair in written_out]))


@pytest.mark.slow
def test_projections_are_unbiased_and_as_near_as_is_said(model, written_out, x64):
    exact, directions = gram_of(written_out), 100
    near = found(model, f"projected,directions={directions},seed=1")
    norms, cosines = np.sqrt(exact.chosen * exact.rejected), cosine(exact)
    assert np.all(np.abs(near.inner - exact.inner) < 4 * norms * np.sqrt((1 + cosines**2) / directions))
    assert np.all(np.abs(near.chosen - exact.chosen) < 4 * exact.chosen * np.sqrt(2 / directions))
    assert np.all(np.abs(near.rejected - exact.rejected) < 4 * exact.rejected * np.sqrt(2 / directions))
    again, other = (found(model, f"projected,directions=4,seed={seed}").inner for seed in (1, 2))
    assert np.array_equal(again, found(model, "projected,directions=4,seed=1").inner) and not np.allclose(again, other)


def test_the_band_is_where_chosen_rises_and_rejected_falls():
    rng = np.random.default_rng(0)
    g, h = rng.normal(size=(2, 50, 3))
    gram = Gram((g * g).sum(1), (h * h).sum(1), (g * h).sum(1))
    low, high = band(gram)
    for ratio in (0.3, 1.0, 3.0):
        step = ratio * g - h
        wanted = ((step * g).sum(1) > 0) & ((step * h).sum(1) < 0)
        assert np.array_equal(wanted, (ratio > low) & ((ratio < high) | np.isnan(high)))
    assert np.isnan(high[gram.inner <= 0]).all()
    falls = gradient_score(gram.inner, np.sqrt(gram.chosen)) > 0
    assert np.array_equal(falls, low > 1)  # DPO, whose incentives are equal


def test_the_columns_of_a_run(tmp_path, tiny_model):
    """The head's numbers make the head score; what it cost is reported, and --by takes the new scores."""
    options = {"model": str(tiny_model), "limit": 4, "dtype": "float64", "by": "head_score", "gradients": "head"}
    table, _ = read_table(score(ScoreConfig(**options, out=str(tmp_path / "run")), quiet=True))
    columns = {name: np.array(table[name].to_pylist(), float) for name in table.column_names if name[:4] in GRAD}
    assert list(columns) == ["grad_norm_chosen", "grad_norm_rejected", "grad_inner", "grad_cosine"]
    own = gradient_score(columns["grad_inner"], columns["grad_norm_chosen"])
    np.testing.assert_allclose(own, np.array(table["head_score"].to_pylist()), rtol=1e-9, atol=1e-9)
    assert "band_low" in table.column_names and "band_high" in table.column_names
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["gradients"]
    assert facts["estimator"] == "head" and facts["pairs"] == 4 and facts["parameters"] == 1291 * 24


GRAD = ("grad",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ful", "did you mean"),
        ("head,rank=3", "head has no numbers"),
        ("lora,rank=0", "'rank=0' is none of its numbers; lora has rank"),
        ("projected,rank=3", "projected has directions"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ChesError, match=message):
        parse_gradients(text)
