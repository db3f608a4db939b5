"""Frozen updates: those of the run itself where the parameters hardly move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.forecast.config import ForecastConfig, training
from ches_jax.forecast.frozen import FrozenStep, FrozenSteps
from ches_jax.forecast.metric import Metric
from ches_jax.forecast.setup import Passes, changes
from ches_jax.train.loop import train
from ches_jax.train.optimizer import make_schedule
from ches_jax.train.setup import prepare


def real_updates(config, tmp_path):
    """What a run of ``ches train`` adds to its parameters."""
    seen = []

    def look(step, model):
        from ches_jax.models.decoder import named_parameters

        seen.append({k: np.asarray(v) for k, v in named_parameters(model).items()})
        return {}

    train(training(config, str(tmp_path / "real")), quiet=True, observers=[look])
    return {k: seen[-1][k] - v for k, v in seen[0].items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "lr", "steps", "loss"),
    [("sgd", 1e-8, 6, "dpo"), ("rmsprop", 1e-10, 3, "dpo"), ("adamw", 1e-10, 3, "ipo_sum"), ("sgd", 1e-8, 3, "simpo")],
)
def test_frozen_updates_sum_to_the_real_ones_as_the_rate_falls(tiny_model, tmp_path, x64, optimizer, lr, steps, loss):
    """SGD over two epochs, since equal minibatches add up to their mean; others over the first.

    What is left is of the order of the rate: 1.1e-5 of the largest change at SGD's 1e-8, 1.1e-4 at 1e-7.
    """
    config = ForecastConfig(
        model=str(tiny_model),
        limit=20,
        holdout=8,
        batch_size=4,
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        loss=loss,
        mesh="data=1",
        dtype="float64",
    )
    passes = Passes.of(prepare(training(config, str(tmp_path / "frozen"))))
    found, _ = passes.frozen_updates()
    bound = 2e-5 if optimizer == "sgd" else 1e-4
    for name, real in real_updates(config, tmp_path).items():
        size = np.abs(real).max()
        np.testing.assert_allclose(np.asarray(found[name]), real, atol=bound * size, err_msg=name)


@pytest.mark.parametrize(("clip", "factor"), [(1.0, 0.2), (10.0, 1.0), (None, 1.0)])
def test_clipping_shortens_a_gradient_and_never_enlarges_it(clip, factor):
    params = {"w": jnp.zeros(2)}
    steps = FrozenSteps(FrozenStep(Metric("sgd", {}, make_schedule("constant", 0.5, 1)), clip), params, [1.0])
    assert steps.add({"w": jnp.array([3.0, -4.0])}) == pytest.approx(factor, rel=1e-5)
    np.testing.assert_allclose(steps.sums.moved["w"], -0.5 * factor * np.array([3.0, -4.0]), rtol=1e-5)


@pytest.mark.slow
def test_clipped_updates_are_as_long_as_the_clip(passes_of, x64):
    passes = passes_of(optimizer="sgd", lr=1.0, clip=1e-3, steps=1)
    moved, start = passes.frozen_updates(by_side=True)
    assert np.sqrt(sum(float(jnp.sum(v * v)) for v in moved.values())) == pytest.approx(1e-3, rel=1e-2)
    # the slopes are clipped with them: they still make up the gradient
    pulled = passes.products(start, [])
    assert pulled is not None
    total = sum(float(jnp.sum(g * g)) for g in start.gradient.values())
    rates = changes(passes.push({k: -g for k, g in start.gradient.items()})(passes.run.pairs.train).first)
    seen = start.counted > 0
    by_rates = -(start.slopes[seen, 0] @ rates.chosen[seen] + start.slopes[seen, 1] @ rates.rejected[seen]) / seen.sum()
    assert by_rates == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("by_side", [True, False])
def test_the_part_of_chosen_responses_is_added_up_with_the_same_shares(by_side):
    steps = FrozenSteps(
        FrozenStep(Metric("sgd", {}, make_schedule("constant", 1.0, 2)), 1.0), {"w": jnp.zeros(1)}, [0.75, 0.25]
    )
    for gradient, of_chosen in ((1.0, 0.5), (2.0, -1.0)):  # the second is clipped to half
        steps.add({"w": jnp.array([gradient])}, {"w": jnp.array([of_chosen])} if by_side else {})
    assert float(steps.sums.mean["w"][0]) == pytest.approx(0.75 * 1 + 0.25 * 1, rel=1e-5)
    found = {k: float(v[0]) for k, v in steps.sums.of_chosen.items()}
    assert found == ({"w": pytest.approx(0.75 * 0.5 - 0.25 * 0.5, rel=1e-5)} if by_side else {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2},  # five of the twelve pairs are not seen
        {"loss": "simpo", "batch_size": 5, "clip": 0.1},  # the loss reads lengths, a minibatch is short
        {"loss": "ipo_mean", "accumulate": 2, "batch_size": 6},
        {"mesh": "data=2,fsdp=2"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_gradients_by_side_are_those_of_shared_rows(passes_of, x64, options):
    """And the part of the chosen responses is what a pull with the slopes gives."""
    passes = passes_of(**options)
    moved, whole = passes.frozen_updates()
    moved_by_side, start = passes.frozen_updates(by_side=True)
    assert whole.of_chosen == {}
    np.testing.assert_allclose(start.slopes, whole.slopes, rtol=1e-11)
    np.testing.assert_array_equal(start.counted, whole.counted)
    pulled = passes.chosen_gradient(passes.run.pairs.train, start.slopes[:, 0] / start.counted.sum())
    for found, expected in (
        (moved_by_side, moved),
        (start.gradient, whole.gradient),
        (start.squares, whole.squares),
        (start.of_chosen, pulled),
    ):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-11 * np.abs(value).max(), err_msg=name)


@pytest.mark.slow
def test_products_are_rates_of_the_pairs(exact):
    """The three inner products against a push along the descent direction: the same means."""
    passes = exact[0]
    with jax.enable_x64(True):
        _, start = passes.frozen_updates(by_side=True)
        probes = passes.run.pairs.held_out
        found = passes.products(start, probes)
        down = {k: -g for k, g in start.gradient.items()}
        rates = passes.push(down)
        assert found is not None and found.probes_rate is not None
        assert found.probes_rate.total == pytest.approx(changes(rates(probes).first).chosen.mean(), rel=1e-9)
        assert found.train_rate.total == pytest.approx(
            changes(rates(passes.run.pairs.train).first).chosen.mean(), rel=1e-9
        )
        assert found.norm_chosen is not None and found.norm_rejected is not None
        assert found.cos_chosen_rejected is not None
        # DPO at the reference: beta / 2 (|G+|^2 - <G+, G->)
        plain = 0.05 * (found.norm_chosen**2 - found.cos_chosen_rejected * found.norm_chosen * found.norm_rejected)
        assert found.train_rate.total == pytest.approx(plain, rel=1e-9)
