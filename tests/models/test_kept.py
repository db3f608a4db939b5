"""What the layers keep for the backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import query_chunked
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import decoder_config

from .test_strict import family

ROWS, LENGTH = 2, 128


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(decoder_config(family("llama")), rngs=nnx.Rngs(0))


def kept(decoder: Decoder, attend, remat: bool) -> tuple[int, list[jax.Array]]:
    """Numbers that lie between forward and backward besides the parameters, and the gradient."""
    graph, state = nnx.split(decoder)
    tokens = jnp.arange(ROWS * LENGTH, dtype=jnp.int32).reshape(ROWS, LENGTH) % decoder.config.vocab_size

    def states(state):
        return nnx.merge(graph, state).hidden(tokens, attend=attend, remat=remat)

    hidden, backward = jax.vjp(states, state)
    own = {leaf.shape for leaf in jax.tree.leaves(state)}
    size = sum(leaf.size for leaf in jax.tree.leaves(backward) if leaf.shape not in own)
    return size, jax.tree.leaves(backward(jnp.cos(hidden)))


@pytest.mark.slow
@pytest.mark.parametrize("attend", [blocks, partial(query_chunked, chunk=64)], ids=["blocks", "query_chunked"])
def test_products_and_attention_are_kept_and_the_rest_is_computed_again(decoder: Decoder, attend):
    c = decoder.config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    stream, attention, products = c.width, q + c.num_heads, q + 2 * kv + c.width + 2 * c.mlp_width + c.width
    size, gradient = kept(decoder, attend, remat=False)
    least, same_gradient = kept(decoder, attend, remat=True)
    tokens = ROWS * LENGTH
    # outside the layers: the final norm, rotations, what is seen
    besides = tokens * (8 * c.width + 4 * c.head_dim)
    assert least <= tokens * c.num_layers * stream + besides
    assert size <= tokens * c.num_layers * (stream + attention + products) + besides
    assert size > least
    for a, b in zip(gradient, same_gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
