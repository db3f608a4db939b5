"""The arithmetic of optimisers with squares apart: the optimiser itself where the squares are the gradient's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.errors import ChesError
from ches_jax.forecast.metric import Metric
from ches_jax.train.optimizer import make_optimizer, make_schedule

PARAMS = {"layers.q.weight": jnp.array([[1.0, -2.0]]), "norm.weight": jnp.array([0.5])}


def gradients(seed: int):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=v.shape), v.dtype) for k, v in PARAMS.items()}


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("rmsprop", {}),
        ("rmsprop", {"momentum": 0.9, "alpha": 0.9}),
        ("sgd", {}),
        ("sgd", {"momentum": 0.5}),
        ("adamw", {"weight_decay": 0.1}),
        ("adamw", {"eps": 0.1}),
    ],
)
def test_its_steps_are_those_of_the_optimiser(name, hyper):
    schedule = make_schedule("cosine", 0.01, 5, 2)
    metric, optimizer = Metric(name, hyper, schedule), make_optimizer(name, schedule, **hyper)
    moments, state = metric.start(PARAMS), optimizer.init(PARAMS)
    for t in range(4):
        g = gradients(t)
        expected, state = optimizer.update(g, state, PARAMS)
        steps: Any = expected
        added, moments = metric.step(moments, g, jax.tree.map(jnp.square, g), jnp.int32(t), PARAMS)
        for k in PARAMS:
            np.testing.assert_allclose(added[k], steps[k], rtol=2e-6)


@pytest.mark.parametrize("name", ["rmsprop", "adamw", "sgd"])
def test_the_metric_of_a_run_moves_a_constant_gradient_as_its_steps_do(name):
    metric = Metric(name, {}, make_schedule("linear", 0.01, 7))
    g, squares = gradients(1), jax.tree.map(jnp.square, gradients(2))
    moved, moments = jax.tree.map(jnp.zeros_like, PARAMS), metric.start(PARAMS)
    for t in range(7):
        added, moments = metric.step(moments, g, squares, jnp.int32(t))
        moved = jax.tree.map(jnp.add, moved, added)
    of_run = metric.of_run(squares, 7)
    further = metric.further(metric.start(PARAMS), g, squares, 0, 7)
    for k in PARAMS:
        np.testing.assert_allclose(further[k], moved[k], rtol=1e-6)
        # eps makes it linear in g to nothing but rounding: it is added to the root of the squares alone
        np.testing.assert_allclose(-of_run[k] * g[k], moved[k], rtol=1e-5)


def test_an_optimiser_whose_metric_is_not_known_is_refused():
    with pytest.raises(ChesError, match=r"--optimizer adafactor: its metric is not known .* rmsprop, adamw, sgd"):
        Metric("adafactor", {}, make_schedule("constant", 1.0, 1))
