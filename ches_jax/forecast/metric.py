r"""The arithmetic of optimisers, with the squares of gradients given apart from the gradients.

An optimiser of ``train.optimizer`` moves parameters by a linear function of the gradients once its second moments are
known. Written so, one step takes a gradient g and squares s:

.. math::
  \text{rmsprop:}\quad & v \leftarrow \alpha v + (1 - \alpha) s, \qquad \Delta = -\eta\, g / (\sqrt{v} + \epsilon) \\
  \text{adamw:}\quad & m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) s, \qquad
     \Delta = -\eta \Big(\frac{m / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t)} + \epsilon} + \lambda \theta\Big) \\
  \text{sgd:}\quad & \Delta = -\eta\, g

With s = g^2 that is the optimiser itself. With the mean squares of minibatch gradients as s it moves any g in the
metric that the run will have: the mean gradient, for updates that are not computed one by one, or 1 everywhere, which
gives the metric itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.errors import ChesError
from ches_jax.train.optimizer import Schedule, decays, optimizer_hyper

Tree = dict[str, Array]
KNOWN = ("rmsprop", "adamw", "sgd")
"""Optimisers whose update is a number for each parameter times its gradient."""


class Moments(NamedTuple):
    """What an optimiser remembers; zeros where it does not use one."""

    first: Tree
    second: Tree


class Metric:
    """The steps of an optimiser of a name, with every hyper-parameter filled in."""

    def __init__(self, name: str, hyper: Mapping[str, float], schedule: Schedule):
        """Takes the optimiser's name and hyper-parameters as ``train.optimizer`` has them.

        Raises:
          ChesError: an optimiser whose update is not a number for each parameter times its gradient.
        """
        self.hyper = optimizer_hyper(name, hyper)
        if name not in KNOWN:
            raise ChesError(
                f"--optimizer {name}: its metric is not known (its update is no multiple of each gradient); "
                f"known are {', '.join(KNOWN)}"
            )
        self.name, self.schedule = name, schedule

    def start(self, params: Tree) -> Moments:
        """Before the first step."""
        return Moments(*(jax.tree.map(jnp.zeros_like, params) for _ in Moments._fields))

    def step(
        self, moments: Moments, gradient: Tree, squares: Tree, count: Array, params: Tree | None = None
    ) -> tuple[Tree, Moments]:
        """What one step adds to the parameters.

        Args:
          moments: before it.
          gradient: what is moved.
          squares: what joins the second moments.
          count: number of the step from 0, int32.
          params: where weight decay pulls from; without them there is none.
        """
        h, (first, second) = self.hyper, moments
        lr = jnp.asarray(self.schedule(count))

        def times(factor: Any, tree: Tree) -> Tree:
            return {k: x * jnp.asarray(factor, x.dtype) for k, x in tree.items()}

        def mix(old: Tree, new: Tree, keep: float) -> Tree:
            return {k: keep * v + (1 - keep) * new[k] for k, v in old.items()}

        if self.name == "adamw":
            first, second = mix(first, gradient, h["b1"]), mix(second, squares, h["b2"])
            done = (count + 1).astype(jnp.float32)
            m, v = times(1 / (1 - h["b1"] ** done), first), times(1 / (1 - h["b2"] ** done), second)
            moved = {k: x / (jnp.sqrt(v[k]) + h["eps"]) for k, x in m.items()}
            if params is not None and h["weight_decay"]:
                where = decays(params)
                moved = {k: x + h["weight_decay"] * params[k] if where[k] else x for k, x in moved.items()}
            return times(-lr, moved), Moments(first, second)
        moved = gradient
        if self.name == "rmsprop":
            second = mix(second, squares, h["alpha"])
            moved = {k: g / (jnp.sqrt(second[k]) + h["eps"]) for k, g in gradient.items()}
        if h["momentum"]:
            moved = first = {k: g + h["momentum"] * first[k] for k, g in moved.items()}
        return times(-lr, moved), Moments(first, second)

    def further(
        self, moments: Moments, gradient: Tree, squares: Tree, done: int, total: int, params: Tree | None = None
    ) -> Tree:
        """The sum of steps ``done`` to ``total`` - 1, each with the same gradient and squares."""

        def one(count: Array, carry: tuple[Tree, Moments]) -> tuple[Tree, Moments]:
            moved, moments = carry
            added, moments = self.step(moments, gradient, squares, count, params)
            return jax.tree.map(jnp.add, moved, added), moments

        zeros = jax.tree.map(jnp.zeros_like, gradient)
        return jax.lax.fori_loop(jnp.int32(done), jnp.int32(total), one, (zeros, moments))[0]

    def of_run(self, squares: Tree, total: int) -> Tree:
        """The metric of a whole run: what ``total`` steps multiply minus a constant gradient by.

        Args:
          squares: mean squares of minibatch gradients.
          total: number of updates.
        """
        ones = jax.tree.map(jnp.ones_like, squares)
        moved = self.further(self.start(squares), ones, squares, 0, total)
        return jax.tree.map(jnp.negative, moved)
