"""Claims of neighbouring works: sources at the functions of ``statements.entanglement`` and ``statements.related``."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory.claims.identities import SEQUENCE, relative
from theory.claims.registry import (
    Context,
    Outcome,
    exact,
    exceptions,
    largest,
    refuted,
    share,
    statistical,
    sweep,
    swept,
)
from theory.statements import entanglement, related
from theory.statements.entanglement import PairKernel
from theory.statements.objectives import dpop
from theory.toy import instances
from theory.toy.instances import Draw
from theory.toy.ufm import descent, flow_rates, gram, pair_log_probs

NEAR = 1e-9
"""Draws closer than this to a boundary are left out of a comparison of booleans."""


def random_kernel(draw: Draw) -> tuple[PairKernel, Array, Array]:
    """A random 2 x 2 Gram matrix of vectors in the plane, at any angle, and positive incentives."""
    sizes = jnp.exp(draw.uniform((2,), -2.0, 2.0))
    cosine = jnp.cos(draw.uniform((), 0.0, np.pi))
    up, down = jnp.exp(draw.uniform((2,), -2.0, 2.0))
    return PairKernel(sizes[0] ** 2, sizes[0] * sizes[1] * cosine, sizes[1] ** 2), up, down


@exact(
    "E1",
    "ideal regime <=> gradient entanglement's condition <=> disentanglement band; calibration lies inside",
    "arXiv 2410.13828; arXiv 2604.18239",
    0.0,
)
@swept(times=100, outcome_of=exceptions)
def band_is_entanglement(draw: Draw) -> dict[str, Array]:
    k, up, down = random_kernel(draw)
    chosen, rejected = entanglement.pair_rates(k, up, down)
    scale = jnp.maximum(up, down) * jnp.maximum(k.chosen, k.rejected)
    ideal = entanglement.regime(k, up, down) == 0
    low, high = entanglement.disentanglement_band(k)
    inside = (low <= up / down) & (up / down <= high)
    calibrated = entanglement.regime(k, *entanglement.reward_calibration(k, up, down)) == 0
    collinear = jnp.abs(k.cross) > (1 - NEAR) * jnp.sqrt(k.chosen * k.rejected)
    return {
        "clear": (jnp.minimum(jnp.abs(chosen), jnp.abs(rejected)) > NEAR * scale) & ~collinear,
        "entanglement": ideal != entanglement.entanglement_is_ideal(k, up, down),
        "band": ideal != inside,
        "calibrated": ~calibrated,
        "inverted": entanglement.regime(k, up, down) == 3,
    }


@refuted(
    "E1b",
    "reward calibration on a batch's mean gradients keeps every sample's chosen response from falling",
    "arXiv 2604.18239, beyond one pair",
    0.05,
)
@swept(times=10, outcome_of=share)
def calibration_of_a_batch(draw: Draw) -> Array:
    common = draw.normal((1, 6))
    gradients = (draw.normal((4, 6)) + common).reshape(2, 2, 6)
    means = gradients.mean(0)
    products = means @ means.T
    k = PairKernel(products[0, 0], products[0, 1], products[1, 1])
    up, down = entanglement.reward_calibration(k, jnp.ones(()), jnp.ones(()))
    return (gradients[:, 0] @ (up * means[0] - down * means[1])).min() < 0


def _changed_losses(draw: Draw, **size: int) -> dict[str, Array]:
    """One pair under losses that neighbouring works change: rates of ln pi(y+) by autodiff, against the theory's."""
    i = instances.random_pair(draw, **size)
    products = gram(i.model, *i.pairs)
    k, scale = PairKernel(products[0, 0], products[0, 1], products[1, 1]), jnp.abs(products).max()
    chosen, rejected = pair_log_probs(i.model, i.pairs)
    # at the reference, where both incentives are beta / 2
    beta = 0.5
    t = entanglement.thresholds(k, jnp.asarray(beta / 2), jnp.asarray(beta / 2))

    def with_sft(up, down):
        return (jax.nn.softplus(-beta * (up - down - (chosen - rejected))) - t.sft_weight * up).mean()

    def with_ratio(up, down):
        return jax.nn.softplus(-(t.weight_ratio * up - down)).mean()

    def shifted(factor, offsets):
        """DPO-Shift with the reference so far below the present."""
        return lambda up, down: related.dpo_shift_loss(
            up[0] - chosen[0] + offsets[0], down[0] - rejected[0] + offsets[1], jnp.asarray(beta), factor
        )

    here, away = jnp.zeros(2), 3 * draw.normal((2,))
    factor, one = jnp.asarray(0.75), jnp.ones(())
    losses = [
        with_sft,
        with_ratio,
        # DPOP's penalty acts below the reference, so the reference is put above the present
        dpop(chosen + 0.3, rejected, beta, t.dpop_lambda),
        shifted(jnp.where(k.cross > 0, t.dpo_shift, one), here),
        shifted(factor, here),
        shifted(one, here),
        shifted(factor, away),
        shifted(one, away),
    ]
    rates = flow_rates(i.model, i.pairs, losses, i.pairs.chosen)[:, 0]
    # where a threshold applies, the rate is 0 there
    falls, positive = k.cross > k.chosen, k.cross > 0
    at_threshold = jnp.where(jnp.stack([falls, positive, falls, positive]), jnp.abs(rates[:4]) / scale, 0.0)
    gaps = [related.dpo_shift_gap(k.cross, (o[0], o[1]), jnp.asarray(beta), factor) for o in (here, away)]
    return {
        "E6": at_threshold.max(),
        "E5": relative(gaps[0], rates[4] - rates[5], scale),
        "E5 away": relative(gaps[1], rates[6] - rates[7], scale),
    }


@lru_cache(maxsize=4)
def _changed(seed: int, count: int) -> dict[str, np.ndarray]:
    return sweep(Context(seed=seed).key("changed losses"), count, _changed_losses, SEQUENCE[:1])


@exact(
    "E6",
    "thresholds from K: at SFT weight, weight ratio, DPOP's lambda* = K+-/K++ - 1, DPO-Shift's f* the rate is 0",
    "derived; arXiv 2402.13228, arXiv 2502.07599",
)
def thresholds_stop_displacement(ctx: Context) -> Outcome:
    return largest(_changed(ctx.seed, ctx.instances)["E6"])


@exact(
    "E5",
    "DPO-Shift gains (1 - f) beta sigma K+- on ln pi(y+) over DPO, at the reference",
    "arXiv 2502.07599, Theorem 2.1",
)
def dpo_shift(ctx: Context) -> Outcome:
    seen = _changed(ctx.seed, ctx.instances)
    away = {"median error with rewards of about 3 nats": float(np.median(seen["E5 away"]))}
    return dataclasses.replace(largest(seen["E5"]), detail=away)


def _squeezed(pi: Array, log_ratio: Array, pushed: Array) -> dict[str, Array]:
    target = related.most_probable_other(pi, pushed)
    return {
        "y- rises": log_ratio[pushed] >= 0,
        "target falls": log_ratio[target] <= 0,
        "another gains more": log_ratio.max() > log_ratio[target],
    }


@exact(
    "E2",
    "squeezing with fixed features: y- falls, and the most probable other token rises, with the largest ratio",
    "arXiv 2407.10490",
    0.0,
)
@swept({"vocabulary": 5}, {"vocabulary": 40}, times=6, outcome_of=exceptions)
def squeezing(draw: Draw, vocabulary: int) -> dict[str, Array]:
    pi = jax.nn.softmax(draw.normal((vocabulary,)) * jnp.exp(draw.uniform((), -1.0, 1.5)))
    pushed = draw.integers((), 0, vocabulary)
    return _squeezed(pi, related.squeeze(pi, pushed, jnp.exp(draw.uniform((), -4.0, 3.0))), pushed)


@refuted(
    "E2t",
    "squeezing with trained features: the most probable other token still gains most",
    "arXiv 2407.10490, beyond fixed features",
    0.05,
)
@swept(
    {"vocabulary": 8, "width": 4},
    outcome_of=lambda seen: Outcome(
        value=float(seen["another gains more"].mean()),
        n=len(seen["y- rises"]),
        detail={name: float(happened.mean()) for name, happened in seen.items()},
    ),
)
def squeezing_of_features(draw: Draw, **size: int) -> dict[str, Array]:
    i = instances.random_single_token(draw, **size)
    velocity = descent(i.model, i.pairs, lambda up, down: down.sum())
    after = jax.tree.map(lambda p, v: p + 0.1 * v, i.model, velocity)
    before, now = (jax.nn.log_softmax(m.unembedding @ m.features[0]) for m in (i.model, after))
    return _squeezed(jnp.exp(before), now - before, i.pairs.rejected.tokens[0, 0])


@statistical(
    "E3",
    "learning dynamics: d ln pi = -eta A K G up to O(eta^2) (halving the step quarters the remainder)",
    "arXiv 2407.10490",
    0.1,
)
def akg_remainder(ctx: Context) -> Outcome:
    def check(draw, vocabulary, width):
        w = draw.normal((vocabulary, width))
        observed, other = draw.normal((2, width))
        g = jax.nn.softmax(w @ other) - jax.nn.one_hot(1, vocabulary, dtype=w.dtype)

        def remainder(eta):
            after = w - eta * jnp.outer(g, other)
            change = jax.nn.log_softmax(after @ observed) - jax.nn.log_softmax(w @ observed)
            return jnp.linalg.norm(change - related.akg_step(w, observed, other, g, jnp.asarray(eta)))

        return jnp.log2(remainder(2e-3) / remainder(1e-3))

    order = float(np.median(sweep(ctx.key(), ctx.instances, check, [{"vocabulary": 7, "width": 4}])))
    return Outcome(value=abs(order - 2), n=ctx.instances, detail={"order": order})


@exact("E4", "a pair is ranked rightly iff its DPO loss is below -ln sigma(-beta u_ref)", "arXiv 2405.19534", 0.0)
@swept(times=100, outcome_of=exceptions)
def ranking(draw: Draw) -> dict[str, Array]:
    u, ref = 20 * draw.normal((2,))
    beta = jnp.exp(draw.uniform((), -4.0, 0.0))
    loss, threshold = jax.nn.softplus(-beta * (u - ref)), related.ranking_threshold(ref, beta)
    # far in the flat tails both sides of the comparison round to the same number
    return {"clear": jnp.abs(loss - threshold) > NEAR * loss, "wrong": (loss < threshold) != (u > 0)}


@exact(
    "E4i",
    "the optimum of DPO under preference probability p has margin u_ref + ln(p/(1-p))/beta",
    "arXiv 2405.19534",
    1e-12,
)
@swept()
def idealised_policy(draw: Draw) -> Array:
    ref, beta, p = draw.normal(()), jnp.exp(draw.uniform((), -3.0, 1.0)), draw.uniform((), 0.02, 0.98)

    def expected_loss(u):
        z = beta * (u - ref)
        return p * jax.nn.softplus(-z) + (1 - p) * jax.nn.softplus(z)

    return jnp.abs(jax.grad(expected_loss)(related.idealised_log_ratio(ref, p, beta))) / beta


@exact(
    "E7",
    "in probabilities |dL/dpi-| / |dL/dpi+| = x+/x-; in log-probabilities the two are equal",
    "arXiv 2406.07327",
)
@swept()
def probability_space(draw: Draw) -> Array:
    x = jnp.exp(draw.uniform((2,), -8.0, 2.0))
    beta = jnp.exp(draw.uniform((), -2.0, 1.0))

    def loss(x):
        return jax.nn.softplus(-beta * (jnp.log(x[0]) - jnp.log(x[1])))

    up, down = related.probability_space_gradients(x[0], x[1], beta)
    by_autodiff = jax.grad(loss)(x)
    in_logs = jax.grad(lambda z: loss(jnp.exp(z)))(jnp.log(x))
    return jnp.stack(
        [
            jnp.abs(up / by_autodiff[0] - 1),
            jnp.abs(down / by_autodiff[1] - 1),
            jnp.abs(-down / up / (x[0] / x[1]) - 1),
            jnp.abs(in_logs[0] + in_logs[1]) / jnp.abs(in_logs[0]),
        ]
    ).max()


@statistical(
    "E8",
    "after an early difference, a shared token is pushed down iff it is more probable after y+ (features 30% apart)",
    "arXiv 2402.13228; the value is the share of tokens predicted wrongly",
    0.3,
)
@swept({"vocabulary": 8, "width": 6}, outcome_of=share)
def smaug_tokens(draw: Draw, vocabulary: int, width: int) -> Array:
    w, h = draw.normal((vocabulary, width)), draw.normal((width,))
    other = h + 0.3 * draw.normal((width,))
    token = draw.integers((), 0, vocabulary)
    p, q = jax.nn.softmax(w @ h)[token], jax.nn.softmax(w @ other)[token]
    # change of the token's logit after y+ through W, for equal incentives
    change = (1 - p) * (h @ h) - (1 - q) * (h @ other)
    return related.dpop_token_falls(p, q) != (change < 0)
