"""Random instances are what they say they are."""

import jax.numpy as jnp
import numpy as np
import pytest

from theory.toy import instances
from theory.toy.instances import Draw, Noise, noise


def draws(count: int):
    numbers = noise((7,), count)
    return [Draw(Noise(jnp.asarray(u), jnp.asarray(g))) for u, g in zip(*numbers, strict=True)]


def test_three_tokens_differ(x64):
    tokens = np.array([instances.three_tokens(d, 3)[0] for d in draws(30)])
    assert all(sorted(row) == [0, 1, 2] for row in tokens)
    assert len({tuple(row) for row in tokens}) == 6


def test_a_pair_shares_exactly_the_tokens_asked_for(x64):
    for d in draws(5):
        i = instances.random_pair(d, vocabulary=4, width=2, length=4, shared=2)
        chosen, rejected = i.pairs.chosen.tokens[0], i.pairs.rejected.tokens[0]
        assert (chosen[:2] == rejected[:2]).all() and chosen[2] != rejected[2]
        assert i.pairs.chosen.mask[0, :3].all()
        # up to and including the prediction of the first difference the two have one feature
        assert (i.pairs.chosen.contexts[0, :3] == i.pairs.rejected.contexts[0, :3]).all()
        assert i.pairs.chosen.contexts[0, 3] != i.pairs.rejected.contexts[0, 3]


def test_a_draw_says_when_its_numbers_are_used_up(x64):
    with pytest.raises(ValueError, match="uniform numbers"):
        draws(1)[0].uniform((10_000,))


def test_the_same_seed_gives_the_same_numbers():
    assert (noise((1, 2), 3).uniform == noise((1, 2), 3).uniform).all()
    assert (noise((1, 2), 3).uniform != noise((1, 3), 3).uniform).any()
