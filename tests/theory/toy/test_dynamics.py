"""Trajectories: the flow against a closed form, RMSProp against PyTorch, kinds of displacement."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from theory.toy import dynamics
from theory.toy.ufm import UFM


def test_the_flow_of_a_quadratic_decays_exponentially(x64):
    times = jnp.array([0.0, 0.5, 1.0])
    path = dynamics.gradient_flow(lambda p: 0.5 * (p**2).sum(), jnp.array([2.0, -1.0]), times)
    np.testing.assert_allclose(path, np.exp(-np.asarray(times))[:, None] * np.array([[2.0, -1.0]]), rtol=1e-8)


def test_frozen_parameters_stay(x64):
    start = UFM(jnp.ones((2, 1)), jnp.ones((1, 1)))

    def loss(m):
        return (m.unembedding**2).sum() + (m.features**2).sum()

    frozen = UFM(True, False)  # type: ignore[arg-type]
    path = dynamics.gradient_flow(loss, start, jnp.array([0.0, 1.0]), trainable=frozen)
    steps = dynamics.optimise(loss, start, optax.adam(0.1), 3, trainable=frozen)
    assert (path.features == 1).all() and (steps.features == 1).all()
    assert (path.unembedding[1] < 0.5).all() and (steps.unembedding[3] < 1).all()
    assert steps.unembedding.shape[0] == 4


def test_rmsprop_is_that_of_torch(x64):
    torch = pytest.importorskip("torch")
    start = np.array([0.3, -2.0, 5.0])
    theirs = torch.tensor(start, requires_grad=True)
    optimiser = torch.optim.RMSprop([theirs], lr=0.01)
    for _ in range(10):
        optimiser.zero_grad()
        (theirs**4).sum().backward()
        optimiser.step()
    ours = dynamics.optimise(lambda p: (p**4).sum(), jnp.array(start), dynamics.torch_rmsprop(0.01), 10)
    np.testing.assert_allclose(ours[-1], theirs.detach().numpy(), rtol=1e-12)


def test_the_sum_along_the_updates_is_exact_for_a_quadratic(x64):
    path = dynamics.optimise(lambda p: (p**2).sum(), jnp.array([1.0, 2.0]), optax.adam(0.3), 5)
    actual = dynamics.cumulative_prediction(lambda p: p**2, path)
    np.testing.assert_allclose(actual, path**2 - path[:1] ** 2, rtol=1e-12, atol=1e-14)


def test_the_second_order_step_is_exact_for_a_quadratic(x64):
    p, update = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.7])
    exact = (p + update) ** 2 - p**2
    np.testing.assert_allclose(dynamics.step_change(lambda p: p**2, p, update, order=2), exact, rtol=1e-12)
    assert (dynamics.step_change(lambda p: p**2, p, update) != exact).all()


def test_invariants_of_a_model_by_hand(x64):
    kept = dynamics.invariants(UFM(jnp.array([[1.0], [2.0]]), jnp.array([[3.0]])))
    assert float(kept.balance[0, 0]) == -4 and float(kept.mean_unembedding[0]) == 3


def test_masses_add_up_by_label():
    masses = dynamics.mass_by_label(jnp.array([[0.5, 0.3, 0.2]]), ("a", "b", "a"))
    assert [round(float(masses[k][0]), 3) for k in ("a", "b")] == [0.7, 0.3]


@pytest.mark.parametrize(
    "change, loss, gains, kind",
    [
        (-1.0, -0.1, {"same": 0.3, "opposite": 0.1}, "benign"),
        (-1.0, -0.1, {"same": 0.1, "opposite": 0.3}, "catastrophic"),
        (-1.0, -0.1, {"same": 0.1, "opposite": 0.0, "other": 0.2}, "unlabelled"),
        (1.0, -0.1, {"same": 0.1, "opposite": 0.3}, "none"),
        (-1.0, 0.1, {"same": 0.1, "opposite": 0.3}, "none"),
    ],
)
def test_kinds_of_displacement(change, loss, gains, kind):
    assert dynamics.displacement_kind(change, loss, gains, "same", "opposite") == kind
