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
    np.testing.assert_allclose(steps.moved["w"], -0.5 * factor * np.array([3.0, -4.0]), rtol=1e-5)


@pytest.mark.slow
def test_clipped_updates_are_as_long_as_the_clip(passes_of, x64):
    passes = passes_of(optimizer="sgd", lr=1.0, clip=1e-3, steps=1)
    moved, start = passes.frozen_updates()
    assert np.sqrt(sum(float(jnp.sum(v * v)) for v in moved.values())) == pytest.approx(1e-3, rel=1e-2)
    # the slopes are clipped with them: they still make up the gradient
    pulled = passes.products(start, [])
    assert pulled is not None
    total = sum(float(jnp.sum(g * g)) for g in start.gradient.values())
    rates = changes(passes.push({k: -g for k, g in start.gradient.items()})(passes.run.pairs.train).first)
    seen = start.counted > 0
    by_rates = -(start.slopes[seen, 0] @ rates.chosen[seen] + start.slopes[seen, 1] @ rates.rejected[seen]) / seen.sum()
    assert by_rates == pytest.approx(total, rel=1e-9)


@pytest.mark.slow
def test_products_are_rates_of_the_pairs(exact):
    """The three inner products against a push along the descent direction: the same means."""
    passes, _, start = exact
    with jax.enable_x64(True):
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
