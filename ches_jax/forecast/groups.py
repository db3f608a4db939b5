r"""What a policy-gradient update does to the responses of a group: rates, and whose doing they are.

With the coefficients c of a group's loss (``advantages``), gradient flow on it alone changes its own responses at

.. math:: \frac{d}{dt} \ln \pi(y_i) = \sum_j c_j K_{ij}, \qquad
          K_{ij} = \langle \nabla \ln \pi(y_i), \nabla \ln \pi(y_j) \rangle

split into the response's own part (j = i), that of the other winners (c_j > 0) and that of the other losers. A winner
whose rate is negative falls although it won: lazy likelihood displacement (Deng et al., On the Effect of Negative
Gradient in Group Relative Deep Reinforcement Optimization, https://arxiv.org/abs/2505.18830). The part of K that runs
through the unembedding matrix alone, which that paper approximates K by, gives ``head_rate``, and summed over the
tokens of a losing response their negative token hidden reward:

.. math:: \mathrm{nthr}_j = \sum_{i:\, c_i > 0} K^{head}_{ij}

A pair is the group of two: with c = (beta/2, -beta/2) these are the rates of DPO at the reference.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ches_jax.data.packing import Candidates, PackedBatch
from ches_jax.distributed.mesh import put_rows
from ches_jax.forecast.metric import Tree
from ches_jax.forecast.model import Model
from ches_jax.forecast.passes import PerItem, Pull, Push, Rows
from ches_jax.models.attention.dense import query_chunked
from ches_jax.models.attention.mask import Visibility
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.precision import inner
from ches_jax.models.segment_sums import segment_sums
from ches_jax.scores.unembedding_gradients import head_products


class Rates(NamedTuple):
    """[N] of the responses of a group, float64: nats per unit of time of gradient flow on its loss."""

    own: np.ndarray
    """c_i K_ii."""
    winners: np.ndarray
    """By the other responses with a positive coefficient."""
    losers: np.ndarray
    """By those with a negative one."""

    @property
    def total(self) -> np.ndarray:
        """All three."""
        return self.own + self.winners + self.losers


class GroupRates:
    """``rates(params, item, coefficients)``: exact rates of the responses of a group, under its own loss alone.

    One backward pass for each response, two forward-mode passes for all; no more than three trees like the parameters
    are held.
    """

    def __init__(self, model: Model, alone: Rows, together: Rows):
        """Compiles at the first group of each shape. ``alone`` and ``together``: rows of one response, of one group."""
        self._pull, self._push = Pull(model, alone), Push(model, together)

    def __call__(self, params: Tree, item: Candidates, coefficients: np.ndarray) -> Rates:
        """Rates; zeros where no coefficient is."""
        none = np.zeros(len(item.responses))
        if not coefficients.any():
            return Rates(none, none, none)
        own = none.copy()
        towards: dict[bool, Tree] = {}
        for i, (response, c) in enumerate(zip(item.responses, coefficients, strict=True)):
            if c:
                gradient = self._pull(params, [Candidates(item.prompt, (response,), 1)], [np.ones(1)])
                own[i] = c * float(inner(gradient, gradient))
                scaled = {k: g * jnp.asarray(c, g.dtype) for k, g in gradient.items()}
                before = towards.get(c > 0)
                towards[c > 0] = scaled if before is None else jax.tree.map(jnp.add, before, scaled)
        by = {
            winning: self._push(params, towards[winning], [item]).first[0] if winning in towards else none
            for winning in (True, False)
        }
        won = coefficients > 0
        return Rates(own, by[True] - np.where(won, own, 0.0), by[False] - np.where(won, 0.0, own))


class HeadKernel:
    """``kernel(params, items)``: for each group [N, N], K through the unembedding matrix alone."""

    def __init__(self, model: Model, rows: Rows):
        """Compiles at the first batch of each shape."""
        self._frozen, self._rows = model.frozen, rows

        def products(params: Tree, frozen: Tree, batch: PackedBatch) -> jax.Array:
            decoder = with_parameters(model.plain, {**frozen, **params})
            seen = Visibility(batch.context_start, batch.context_end, batch.own_start)
            hidden = decoder.hidden(
                batch.tokens, batch.positions, seen, batch.lengths, attend=query_chunked, mesh=model.on
            )
            predicting = jnp.take_along_axis(hidden, batch.source[..., None], axis=1)
            head = head_products(
                predicting, batch.target, batch.segment, batch.item, batch.preferred, decoder.unembedding,
                decoder.logit_transform, logical=decoder.auto_mesh(model.on),
            )  # fmt: skip
            return segment_sums(head, batch.segment, batch.last.shape[1])

        self._run = jax.jit(products, out_shardings=NamedSharding(rows.mesh, PartitionSpec()))

    def __call__(self, params: Tree, items: Sequence[Candidates]) -> PerItem:
        """Kernels, float64."""
        found: PerItem = [np.zeros(0)] * len(items)
        for batch, places in self._rows.batches(items):
            numbers = np.asarray(self._run(params, self._frozen, put_rows(batch, self._rows.mesh)), np.float64)
            for p in places:
                between = numbers[p.row, p.shared : p.shared + p.segments, p.shared : p.shared + p.segments]
                own, shared = between[1:, 1:], between[0, 1:]
                found[p.item] = between[0, 0] + shared[None, :] + shared[:, None] + own
        return found


def nthr(kernel: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """[N] negative token hidden reward of each losing response, summed over its tokens; NaN for others.

    >>> nthr(np.array([[4.0, 1.0], [1.0, 4.0]]), np.array([0.5, -0.5])).tolist()
    [nan, 1.0]
    """
    return np.where(coefficients < 0, kernel[coefficients > 0].sum(0), np.nan)


def weighted(groups: Sequence[np.ndarray], size: int) -> list[Any]:
    """Coefficients of the mean loss of ``size`` groups, from those of each group's loss: minus them, over the size."""
    return [-c / size for c in groups]
