"""What the layers keep for the backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.models.adapters.lora import adapted, make_spec
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import dense, query_chunked
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.models.families.registry import decoder_config
from ches_jax.train.policy import marked_trained

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


@pytest.mark.parametrize("remat", [False, True])
def test_an_adapter_adds_to_what_is_kept_only_its_rank(remat):
    """The sum of both products is kept, not each of them."""
    config, rank = decoder_config(family("llama")), 2
    spec = make_spec(rank, 4.0, "all-linear", config)
    rng = np.random.default_rng(0)

    def numbers(abstract) -> int:
        params = {n: jnp.asarray(rng.normal(size=s.shape), s.dtype) for n, s in named_parameters(abstract).items()}
        return kept(with_parameters(abstract, params), dense, remat)[0]

    plain, both = abstract_decoder(config), marked_trained(adapted(abstract_decoder(config), spec), adapters=True)
    of_adapters = 0 if remat else ROWS * LENGTH * config.num_layers * rank * len(spec)
    # a few numbers of scaled B
    scaled = sum(s.size for n, s in named_parameters(both).items() if n.endswith("lora_b"))
    assert numbers(both) <= numbers(plain) + of_adapters + scaled
