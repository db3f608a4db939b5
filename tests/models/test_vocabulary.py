"""Embedding and unembedding stay sharded: the numbers are those of one device, and no table is gathered."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import LogicalMesh, make_mesh
from ches_jax.models import logprobs, unembedding_pieces
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import decoder_config
from ches_jax.models.logprobs import Head, forward_token_logps, token_divergences, token_logps, token_statistics
from ches_jax.models.sharding import partition_spec
from ches_jax.models.vocabulary import looked_up, products
from ches_jax.plan.compiled_text import collectives

from .test_mesh import SIZES, spread
from .test_strict import family

ROWS, COUNT, WIDTH = 8, 6, 8
VOCABULARIES = {"unembedding": 22, "states": 54}
"""By what travels: the states of 24 positions, or what a device of ``tensor`` has of the unembedding. Both vocabularies
lie over two devices and not over four: the parts are padded."""
VOCABULARY = VOCABULARIES["unembedding"]
PIECE_HERE = 64
"""Numbers that travel at a time in these tests: several pieces."""
HEADS = (Head(), Head(0.7, 2.5, 4), Head(None, 3.0, 6, True))


def inputs(mesh, rows=ROWS, vocabulary=VOCABULARY):
    rng = np.random.default_rng(3)
    h, g = rng.normal(size=(rows, COUNT, WIDTH)) * 2, rng.normal(size=(rows, COUNT))
    w, y = rng.normal(size=(vocabulary, WIDTH)), rng.integers(0, vocabulary, (rows, COUNT)).astype(np.int32)
    logical = LogicalMesh.of(mesh)
    place = NamedSharding(mesh, partition_spec("lm_head.weight", w.shape, mesh))
    by_row = NamedSharding(mesh, logical.rows(rows))
    return jax.device_put(h, by_row), jax.device_put(w, place), jax.device_put(y, by_row), jax.device_put(g, by_row)


@pytest.fixture
def pieces(monkeypatch):
    for module in (logprobs, unembedding_pieces):
        monkeypatch.setattr(module, "PIECE", PIECE_HERE)


@pytest.mark.parametrize("words", ["data=2,fsdp=2,tensor=2", "fsdp=4,expert=2"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("travels", VOCABULARIES)
def test_log_probabilities_and_gradients_are_those_of_one_device(x64, pieces, words, head, travels):
    """Whatever travels; of a piece of the unembedding some rows are padding."""
    mesh = make_mesh(words)
    on = head._replace(logical=LogicalMesh.of(mesh))

    def value_and_gradients(head, h, w, y, g):
        loss = lambda h, w: (token_logps(h, w, y, head) * g).sum()  # noqa: E731
        back = jax.grad(loss, (0, 1))(h, w)
        forward = jax.jvp(lambda h: forward_token_logps(h, w, y, head), (h,), (h * h,))
        return token_logps(h, w, y, head), *back, *forward, token_statistics(h, w, y, head)

    arrays = inputs(mesh, vocabulary=VOCABULARIES[travels])
    alone = jax.jit(partial(value_and_gradients, head))(*map(np.asarray, arrays))
    together = jax.jit(partial(value_and_gradients, on))(*arrays)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def divergences_of(mesh, ref_width):
    """A function of states, W and a cotangent, and its arrays on the mesh; the reference has another width."""
    h, w, _, g = inputs(mesh)
    rng = np.random.default_rng(4)
    r, v = rng.normal(size=(ROWS, COUNT, ref_width)), rng.normal(size=(VOCABULARY, ref_width))
    r = jax.device_put(r, NamedSharding(mesh, LogicalMesh.of(mesh).rows(ROWS)))
    v = jax.device_put(v, NamedSharding(mesh, partition_spec("lm_head.weight", v.shape, mesh)))
    heads = Head(None, 3.0), Head(0.7)

    def value_and_gradients(logical, h, w, r, v, g):
        own, ref = (head._replace(logical=logical) for head in heads)
        found, back = jax.vjp(lambda h, w: token_divergences(h, w, own, r, v, ref), h, w)
        return found, *back(g)

    return value_and_gradients, (h, w, r, v, g)


@pytest.mark.parametrize("words", ["data=2,fsdp=2,tensor=2", "fsdp=4,expert=2"])
@pytest.mark.parametrize("ref_width", [16, 6])
def test_divergences_from_a_reference_are_those_of_one_device(x64, pieces, words, ref_width):
    """Also where only one of the two widths divides over the devices."""
    mesh = make_mesh(words)
    run, arrays = divergences_of(mesh, ref_width)
    alone = jax.jit(partial(run, None))(*map(np.asarray, arrays))
    for a, b in zip(jax.jit(partial(run, LogicalMesh.of(mesh)))(*arrays), alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("words", ["data=2,fsdp=2,tensor=2", "fsdp=4,expert=2"])
def test_divergences_gather_no_table(x64, pieces, words):
    """States travel, a chunk at a time; of a table a device's part, turned, or its gradient."""
    mesh = make_mesh(words)
    logical, (run, arrays) = LogicalMesh.of(mesh), divergences_of(mesh, 16)
    found = collectives(str(jax.jit(partial(run, logical)).lower(*arrays).compile().as_text()))
    assert max(c.bytes for c in found if c.kind in ("all-gather", "reduce-scatter")) <= PIECE_HERE * 8
    parts = -(-VOCABULARY // logical.size("fsdp", "tensor"))
    assert max(c.bytes for c in found) <= parts * 16 * 8


@pytest.mark.parametrize("words", ["data=2,fsdp=2,tensor=2", "fsdp=4,expert=2"])
@pytest.mark.parametrize("travels", VOCABULARIES)
def test_what_is_less_travels_a_piece_at_a_time(pieces, words, travels):
    """Of the unembedding in the forward pass, again in the backward pass, and its gradient; or of the states."""
    mesh = make_mesh(words)
    head = Head(logical=LogicalMesh.of(mesh))
    arrays = inputs(mesh, vocabulary=VOCABULARIES[travels])
    h, w, y, g = (a.astype(jnp.float32) if a.dtype != jnp.int32 else a for a in arrays)
    run = jax.jit(jax.grad(lambda h, w: (token_logps(h, w, y, head) * g).sum(), (0, 1)))
    found = collectives(str(run.lower(h, w).compile().as_text()))
    sent = [c.bytes // 4 for c in found if c.kind in ("all-gather", "reduce-scatter")]
    assert WIDTH <= max(sent) <= PIECE_HERE


@pytest.mark.parametrize(("words", "rows"), [("data=2,fsdp=2,tensor=2", 8), ("fsdp=4,tensor=2", 3)])
def test_a_lookup_is_exact_and_so_is_its_gradient(words, rows):
    """Also of rows that do not divide over the devices, which all of them hold."""
    mesh = make_mesh(words)
    _, w, y, _ = inputs(mesh, rows)
    cotangent = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (rows, COUNT, WIDTH)), jnp.float32)

    def both(logical, w, y):
        found, back = jax.vjp(lambda w: looked_up(w, y, "float32", logical), w)
        return found, back(cotangent)[0]

    w = w.astype(jnp.float32)
    alone = jax.jit(partial(both, None))(np.asarray(w), np.asarray(y))
    for a, b in zip(jax.jit(partial(both, LogicalMesh.of(mesh)))(w, y), alone, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("words", "rows"), [("data=2,fsdp=2,tensor=2", 8), ("fsdp=4,expert=2", 8), ("fsdp=4,tensor=2", 3)]
)
def test_products_are_those_of_one_device_and_gather_no_table(x64, words, rows):
    """Of one state of each row; also of rows that do not divide over the devices."""
    mesh = make_mesh(words)
    h, w, *_ = inputs(mesh, rows)
    run = jax.jit(partial(products, logical=LogicalMesh.of(mesh)))
    np.testing.assert_allclose(run(h[:, 0], w), np.asarray(h)[:, 0] @ np.asarray(w).T, rtol=1e-12, atol=1e-12)
    found = collectives(str(run.lower(h[:, 0], w).compile().as_text()))
    assert found and all(c.kind != "all-gather" for c in found)


@pytest.mark.parametrize("words", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_no_table_of_the_vocabulary_is_gathered(words):
    """In the compiled text of log-probabilities and their gradient, nothing as large as a table travels."""
    vocabulary = 4096
    config = decoder_config(family("llama", **{**SIZES, "vocab_size": vocabulary, "tie_word_embeddings": False}))
    mesh = make_mesh(words)
    model = spread(Decoder(config, rngs=nnx.Rngs(0)), mesh)
    tokens = jax.device_put(np.zeros((8, 8), np.int32), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))

    def loss(model, tokens):
        h = model.hidden(tokens, mesh=mesh)
        return token_logps(h, model.unembedding, tokens, Head(chunk=2, logical=LogicalMesh.of(mesh))).sum()

    found = collectives(str(jax.jit(nnx.value_and_grad(loss)).lower(model, tokens).compile().as_text()))
    table = 4 * vocabulary * config.width
    assert max(c.bytes for c in found if c.kind == "all-gather") < table / 16
    # gradients are added up over data, those of both tables at once: of the parts that a device holds
    assert max(c.bytes for c in found) <= 2 * table / LogicalMesh.of(mesh).size("fsdp", "tensor")
