r"""What a pair's 2 x 2 kernel decides: regimes, bands and thresholds of works around the paper.

With :math:`K_{++}, K_{+-}, K_{--}` the inner products of the gradients of :math:`\ln \pi(y^+)` and
:math:`\ln \pi(y^-)`, and incentives :math:`d^+, d^- > 0`, identity (*) for one pair reads

.. math::
  \dot{\ln \pi}(y^+) = d^+ K_{++} - d^- K_{+-}, \qquad \dot{\ln \pi}(y^-) = d^+ K_{+-} - d^- K_{--} .

The sources are named at each function; formulas are derived here from their published ideas and checked numerically.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class PairKernel(NamedTuple):
    """Inner products of one pair's gradients, or arrays of them."""

    chosen: Float[Array, "*B"]
    cross: Float[Array, "*B"]
    rejected: Float[Array, "*B"]


class Thresholds(NamedTuple):
    """Smallest changes of the loss that keep ln pi(y+) from falling at this instant; NaN where there is none."""

    sft_weight: Array
    """Weight of an SFT term: max(0, d^- K+- - d^+ K++) / K++ (Proposition 1)."""
    weight_ratio: Array
    """d^+ / d^-: K+- / K++ (Proposition 2)."""
    dpop_lambda: Array
    """DPOP's penalty below the reference: K+- / K++ - 1 (Pal et al., arXiv 2402.13228)."""
    dpo_shift: Array
    """DPO-Shift's factor on the rejected reward, at the reference: K++ / K+- (Yang et al., arXiv 2502.07599)."""


IDEAL, DISPLACED, LIFTED, INVERTED = "ideal", "displaced", "lifted", "inverted"
REGIMES = (IDEAL, DISPLACED, LIFTED, INVERTED)
"""y+ up and y- down; both down; both up; y+ down and y- up (impossible for one pair: K is positive semidefinite)."""


def pair_rates(k: PairKernel, up: Array, down: Array) -> tuple[Array, Array]:
    """Rates of ln pi(y+) and ln pi(y-)."""
    return up * k.chosen - down * k.cross, up * k.cross - down * k.rejected


def regime(k: PairKernel, up: Array, down: Array) -> Array:
    """Index into ``REGIMES``."""
    chosen, rejected = pair_rates(k, up, down)
    return jnp.where(chosen >= 0, jnp.where(rejected <= 0, 0, 2), jnp.where(rejected <= 0, 1, 3))


def entanglement_is_ideal(k: PairKernel, up: Array, down: Array) -> Array:
    r"""Gradient entanglement (Yuan et al., arXiv 2410.13828): y+ rises and y- falls iff

    .. math:: K_{+-} \le \min( \tfrac{d^+}{d^-} K_{++}, \tfrac{d^-}{d^+} K_{--} ) .
    """  # noqa: D415
    return k.cross <= jnp.minimum(up / down * k.chosen, down / up * k.rejected)


def disentanglement_band(k: PairKernel) -> tuple[Array, Array]:
    r"""The band (arXiv 2604.18239) that :math:`d^+ / d^-` must lie in for the ideal regime.

    .. math:: \rho r^* \le d^+ / d^- \le r^* / \rho, \qquad r^* = \sqrt{K_{--} / K_{++}}, \quad \rho = \cos

    Returns:
      Its two ends; (0, inf) where the cosine is not positive.
    """
    best = jnp.sqrt(k.rejected / k.chosen)
    cosine = k.cross / jnp.sqrt(k.chosen * k.rejected)
    free = cosine <= 0
    safe = jnp.where(free, 1.0, cosine)
    return jnp.where(free, 0.0, safe * best), jnp.where(free, jnp.inf, best / safe)


def reward_calibration(k: PairKernel, up: Array, down: Array) -> tuple[Array, Array]:
    r"""Incentives rescaled by :math:`\alpha = \sqrt{r^*/r}` and :math:`1/\alpha`, so that their ratio is :math:`r^*`.

    In the middle of the band, hence ideal for one pair; on a batch whose kernel is that of the mean, single pairs can
    still be displaced (arXiv 2604.18239).
    """
    factor = jnp.sqrt(jnp.sqrt(k.rejected / k.chosen) / (up / down))
    return up * factor, down / factor


def thresholds(k: PairKernel, up: Array, down: Array) -> Thresholds:
    """What it would take for y+ not to fall; see ``Thresholds``."""
    return Thresholds(
        sft_weight=jnp.maximum(0.0, -(up * k.chosen - down * k.cross) / k.chosen),
        weight_ratio=k.cross / k.chosen,
        dpop_lambda=k.cross / k.chosen - 1,
        dpo_shift=jnp.where(k.cross > 0, k.chosen / jnp.where(k.cross > 0, k.cross, 1.0), jnp.nan),
    )
