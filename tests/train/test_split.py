"""Which pairs are held out, in which order the others come, and what a batch gives to its loss."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.errors import ChesError
from ches_jax.losses import get_loss
from ches_jax.train.batch_loss import DESIRABLE, loss_inputs, update_metrics
from ches_jax.train.data.split import Plan, _drawn, make_plan


def rows(*indices: int) -> list[Any]:
    return [SimpleNamespace(index=i) for i in indices]


def test_held_out_pairs_are_drawn_by_the_seed_and_all_of_a_row_go_together():
    pairs = rows(*(i for i in range(20) for _ in range(2)))
    drawn = [_drawn(pairs, 5, seed) for seed in (0, 0, 1)]
    (out, stay), again, other = drawn
    assert sorted([*out, *stay]) == list(range(40))
    assert len(out) == 10 and (out[::2] + 1 == out[1::2]).all() and (out[::2] % 2 == 0).all()
    assert (out == again[0]).all() and (out != other[0]).any()
    assert out.tolist() != list(range(10))
    with pytest.raises(ChesError, match="there are 20 rows in all"):
        _drawn(pairs, 20, 0)


def test_every_epoch_has_an_order_of_its_own_and_the_first_is_no_exception():
    plan = Plan(pairs=10, batch_size=4, accumulate=2, total=6, seed=0)
    order = [np.concatenate([np.concatenate(plan.update(t)) for t in epoch]) for epoch in ((0, 1, 2), (3, 4, 5))]
    assert all(sorted(o) == list(range(10)) for o in order)
    assert order[0].tolist() != list(range(10)) and (order[0] != order[1]).any()
    assert [len(part) for part in plan.update(0)] == [2, 2] and [len(part) for part in plan.update(2)] == [2]


@pytest.mark.parametrize(("epochs", "total"), [(0.5, 2), (1.0, 3), (2.0, 6), (0.01, 1)])
def test_a_part_of_an_epoch_is_rounded_up_to_whole_updates(epochs, total):
    config: Any = SimpleNamespace(batch_size=4, steps=None, epochs=epochs, accumulate=1, seed=0)
    assert make_plan(config, 10).total == total


def test_a_batch_gives_its_first_response_as_chosen_and_its_last_as_rejected():
    batch: Any = SimpleNamespace(
        reference=np.array([[1.0, 2.0, 3.0]]), counts=np.array([[4, 5, 6]]), extra={}, tokens=None
    )
    logps: Any = SimpleNamespace(
        responses=jnp.array([[-1.0, -2.0, -3.0]]), head_norms=(None, None), tokens=None, fields=None
    )
    found = loss_inputs(get_loss("simpo"), batch, logps, {})
    assert (found.logp_chosen, found.logp_rejected) == (-1.0, -3.0)
    assert (found.chosen_tokens, found.rejected_tokens) == (4, 6)
    found = loss_inputs(get_loss("dpo"), batch, logps, {})
    assert (found.ref_logp_chosen, found.ref_logp_rejected) == (1.0, 3.0)


def test_means_of_good_and_of_bad_rows_are_over_those_rows():
    """Each row's number was multiplied by whether it is of the side, and the mean taken over all."""
    means = {"loss": 0.5, "rewards/chosen": 1.0, "rewards/rejected": -3.0, "logps/chosen": -2.0, "logps/rejected": -6.0}
    found = update_metrics({**means, DESIRABLE: 0.25})
    assert found == {
        "loss": 0.5, "rewards/chosen": 4.0, "rewards/rejected": -4.0, "rewards/margins": 8.0, "logps/chosen": -8.0,
        "logps/rejected": -8.0,
    }  # fmt: skip
    assert update_metrics({**means, DESIRABLE: 1.0}).keys() == {"loss", "rewards/chosen", "logps/chosen"}
