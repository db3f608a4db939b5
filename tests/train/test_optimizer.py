"""Optimisers against torch, step by step; schedules; messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.errors import ChesError
from ches_jax.train.optimizer import OPTIMIZERS, clipped, decays, make_optimizer, make_schedule

STEPS = 30


def gradients():
    rng = np.random.default_rng(5)
    scale = 10.0 ** rng.uniform(-6, 2, (4, 3))  # from far below eps to large
    return [rng.normal(size=(4, 3)) * scale for _ in range(STEPS)]


def ours(name, dtype, lr=3e-3, **hyper):
    optimizer = make_optimizer(name, make_schedule("constant", lr, STEPS), **hyper)
    params = {"mlp.weight": jnp.asarray(np.linspace(-1, 1, 12).reshape(4, 3), dtype)}
    state, seen = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for g in gradients():
        updates, state = update({"mlp.weight": jnp.asarray(g, dtype)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append(np.asarray(params["mlp.weight"]))
    return seen


def theirs(make):
    import torch

    p = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3))
    optimizer, seen = make(torch.optim, [p]), []
    for g in gradients():
        p.grad = torch.tensor(g)
        optimizer.step()
        seen.append(p.detach().numpy().copy())
    return seen


CASES = {
    "rmsprop": ({}, lambda o, p: o.RMSprop(p, lr=3e-3)),
    "rmsprop momentum": ({"momentum": 0.9}, lambda o, p: o.RMSprop(p, lr=3e-3, momentum=0.9)),
    "adamw": ({"weight_decay": 0.01}, lambda o, p: o.AdamW(p, lr=3e-3, weight_decay=0.01)),
    "sgd": ({"momentum": 0.9}, lambda o, p: o.SGD(p, lr=3e-3, momentum=0.9)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_torchs(x64, case):
    hyper, make = CASES[case]
    # the schedule is float32, so the learning rate is 3e-3 to 1e-8 relative
    for a, b in zip(ours(case.split()[0], jnp.float64, **hyper), theirs(make), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-8, atol=3e-8)


def test_the_first_step_of_rmsprop_is_ten_learning_rates_of_sign(x64):
    first = ours("rmsprop", jnp.float64)[0].ravel()
    start, g = np.linspace(-1, 1, 12), gradients()[0].ravel()
    large = np.abs(g) > 1e-4
    np.testing.assert_allclose((first - start)[large], -10 * 3e-3 * np.sign(g)[large], rtol=2e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_lowers_a_quadratic_in_float32(name):
    optimizer = make_optimizer(name, make_schedule("linear", 0.05, 100, 10))
    params = {"a.weight": jnp.ones((3, 2)), "norm.weight": jnp.full((3,), 2.0)}
    state = optimizer.init(params)

    @jax.jit
    def update(params, state):
        grads = jax.tree.map(lambda p: 2 * p, params)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for _ in range(100):
        params, state = update(params, state)
    assert all(float(jnp.abs(p).max()) < 1 for n, p in params.items() if n == "a.weight")
    assert all(p.dtype == jnp.float32 for p in params.values())


def test_schedules_are_those_of_transformers():
    at = [float(make_schedule("linear", 2.0, 10, 2)(jnp.int32(i))) for i in (0, 1, 2, 6, 10)]
    np.testing.assert_allclose(at, [0, 1, 2, 1, 0])
    at = [float(make_schedule("cosine", 2.0, 10)(jnp.int32(i))) for i in (0, 5, 10)]
    np.testing.assert_allclose(at, [2, 1, 0], atol=1e-6)
    assert float(make_schedule("constant", 2.0, 10)(jnp.int32(99))) == 2.0


def test_clipping_scales_to_the_norm():
    grads = {"w": jnp.asarray([3.0, 4.0])}
    np.testing.assert_allclose(clipped(grads, jnp.float32(5.0), 1.0)["w"], [0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(clipped(grads, jnp.float32(5.0), 10.0)["w"], [3.0, 4.0])


def test_norms_and_biases_do_not_decay():
    assert decays({"a.weight": 1, "norm.weight": 1, "a.bias": 1}) == {  # type: ignore[dict-item]
        "a.weight": True,
        "norm.weight": False,
        "a.bias": False,
    }
    params = {"a.weight": jnp.ones((2, 2)), "norm.weight": jnp.ones(2), "a.bias": jnp.ones(2)}
    optimizer = make_optimizer("adamw", make_schedule("constant", 0.5, 1), weight_decay=0.1)
    moved, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert {name: float(step.mean()) for name, step in moved.items()} == {  # type: ignore[union-attr]
        "a.weight": pytest.approx(-0.05), "norm.weight": 0.0, "a.bias": 0.0,
    }  # fmt: skip


def test_unknown_names_are_errors_that_list_the_names():
    schedule = make_schedule("constant", 1.0, 1)
    with pytest.raises(ChesError, match="no optimiser is named 'adam'; the names are: rmsprop, adamw, adafactor, sgd"):
        make_optimizer("adam", schedule)
    with pytest.raises(ChesError, match="no hyper-parameter 'beta'; it has: alpha, eps, momentum"):
        make_optimizer("rmsprop", schedule, beta=1.0)
    with pytest.raises(ChesError, match="expected one of constant, linear, cosine"):
        make_schedule("step", 1.0, 1)
