"""Routed experts: every way to multiply by groups is the same product, and a token's experts are its own affair."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.models.attention.mask import causal
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.config import ExpertsConfig
from ches_jax.models.experts import _every_group, _in_best_groups, _one_group_at_a_time, _ragged

SIZES = (7, 0, 20, 1)
"""Rows of each group: one is empty, and five rows belong to none."""
ROWS = 33


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(ROWS, 3))), jnp.asarray(rng.normal(size=(4, 5, 3))), jnp.array(SIZES, jnp.int32)


def by_hand(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """The definition, group by group."""
    ends = np.cumsum(SIZES)
    parts = [x[end - n : end] @ weight[g].T for g, (n, end) in enumerate(zip(SIZES, ends, strict=True))]
    return jnp.concatenate([*parts, jnp.zeros((ROWS - ends[-1], weight.shape[1]))])


@pytest.mark.parametrize("product", [_one_group_at_a_time, _every_group, _ragged])
def test_grouped_products_and_their_derivatives_in_both_modes(product):
    with jax.enable_x64(True):
        x, weight, sizes = (a.astype(jnp.float64) if a.ndim > 1 else a for a in inputs())

        @jax.jit
        def all_of(x, weight):
            def one(way):
                value, tangent = jax.jvp(lambda x, w: way(x, w, sizes), (x, weight), (jnp.cos(x), jnp.cos(weight)))
                return value, tangent, jax.grad(lambda x, w: (way(x, w, sizes) ** 3).sum(), (0, 1))(x, weight)

            return one(product), one(by_hand)

        actual, expected = all_of(x, weight)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), actual, expected)


def test_experts_are_chosen_within_the_groups_whose_two_best_are_best_together():
    e = ExpertsConfig(count=6, per_token=2, width=1, groups=3, groups_kept=1)
    merit = jnp.array([[0.9, 0.0, 0.5, 0.6, 0.1, 0.2]])  # the best expert is in no group that is kept
    assert _in_best_groups(merit, e).tolist() == [[-np.inf, -np.inf, 0.5, np.float32(0.6), -np.inf, -np.inf]]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_the_balance_loss_is_that_of_transformers(golden: Path, family: str):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    lengths = np.array([19, 32])
    ids = np.random.default_rng(0).integers(5, 400, (2, 32)).astype(np.int32)
    real = np.arange(32)[None] < lengths[:, None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(golden / family / "policy", dtype=torch.float32)
    with torch.no_grad():
        out = theirs(torch.tensor(ids).long(), attention_mask=torch.tensor(real).long(), output_router_logits=True)
    model = load_model(golden / family / "policy")
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (2, 32))
    each = np.broadcast_to(lengths[:, None], (2, 32)).astype(np.int32)
    tokens, places, lengths_of, counted = (jnp.asarray(a) for a in (ids, positions, each, real))
    _, balance = model.hidden_and_balance(tokens, places, causal(counted), lengths_of, counted)
    assert float(balance) == pytest.approx(float(out.aux_loss), rel=1e-6)
