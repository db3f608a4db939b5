"""Claims of neighbouring works (sources at the functions of ``theory.entanglement`` and ``theory.related``)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory import entanglement, instances, related
from theory.claims.identities import SEQUENCE, relative, stack
from theory.claims.registry import Context, Outcome, claim, error_outcome, sweep
from theory.entanglement import PairKernel
from theory.instances import Draw, PairInstance
from theory.objectives import dpop
from theory.ufm import kernel, pair_log_probs, rates_by_autodiff

NEAR = 1e-9
"""Draws closer than this to a boundary are left out of a comparison of booleans."""


def random_kernel(draw: Draw) -> tuple[PairKernel, Array, Array]:
    """A random 2 x 2 Gram matrix of vectors in the plane, at any angle, and positive incentives."""
    sizes = jnp.exp(draw.uniform((2,), -2.0, 2.0))
    cosine = jnp.cos(draw.uniform((), 0.0, np.pi))
    up, down = jnp.exp(draw.uniform((2,), -2.0, 2.0))
    return PairKernel(sizes[0] ** 2, sizes[0] * sizes[1] * cosine, sizes[1] ** 2), up, down


def _disagreements(seen: dict[str, np.ndarray]) -> Outcome:
    clear = seen.pop("clear")
    wrong = {name: int((values & clear).sum()) for name, values in seen.items()}
    return Outcome(value=float(sum(wrong.values())), n=int(clear.sum()), detail=wrong)


@claim(
    "E1",
    "ideal regime <=> gradient entanglement's condition <=> disentanglement band; calibration lies inside",
    source="arXiv 2410.13828; arXiv 2604.18239",
    status="exact",
    tolerance=0.0,
)
def band_is_entanglement(ctx: Context) -> Outcome:
    def check(draw):
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

    return _disagreements(sweep(ctx.key("E1"), 100 * ctx.instances, check, [{}]))


@claim(
    "E1b",
    "reward calibration on a batch's mean gradients keeps every sample's chosen response from falling",
    source="arXiv 2604.18239, beyond one pair",
    status="refuted as printed",
    tolerance=0.05,
)
def calibration_of_a_batch(ctx: Context) -> Outcome:
    def check(draw):
        common = draw.normal((1, 6))
        gradients = (draw.normal((4, 6)) + common).reshape(2, 2, 6)
        means = gradients.mean(0)
        gram = means @ means.T
        k = PairKernel(gram[0, 0], gram[0, 1], gram[1, 1])
        up, down = entanglement.reward_calibration(k, jnp.ones(()), jnp.ones(()))
        return (gradients[:, 0] @ (up * means[0] - down * means[1])).min() < 0

    seen = sweep(ctx.key("E1b"), 10 * ctx.instances, check, [{}])
    return Outcome(value=float(seen.mean()), n=len(seen), detail={"meaning": "share of 2-sample batches that lose one"})


def _at_threshold(draw: Draw, **size: int) -> dict[str, Array]:
    """Rates of ln pi(y+) with the loss changed by exactly the threshold, by autodiff: 0 where a threshold applies."""
    i: PairInstance = instances.random_pair(draw, **size)
    both = stack(*i.pairs)
    gram = kernel(i.model, both, both).total
    k = PairKernel(gram[0, 0], gram[0, 1], gram[1, 1])
    chosen, rejected = pair_log_probs(i.model, i.pairs)
    t = entanglement.thresholds(k, jnp.asarray(0.25), jnp.asarray(0.25))
    beta = 0.5
    scale = jnp.abs(gram).max()

    def rate(loss):
        return rates_by_autodiff(i.model, i.pairs, loss, i.pairs.chosen)[0] / scale

    def dpo(u):
        # at the reference, where both incentives are beta / 2
        return jax.nn.softplus(-beta * (u - (chosen - rejected)[0]))

    def with_sft(up, down):
        return jax.vmap(dpo)(up - down).mean() - t.sft_weight * up.mean()

    def with_ratio(up, down):
        ratio = t.weight_ratio
        tilted = jax.vmap(lambda u: jax.nn.softplus(-u))(ratio * up - down)
        return tilted.mean()

    def shifted(up, down):
        reward = beta * (up - chosen), t.dpo_shift * beta * (down - rejected)
        return jax.nn.softplus(-(reward[0] - reward[1])).mean()

    # DPOP's penalty acts below the reference, so the reference is put above the present
    strength = t.dpop_lambda
    falls = k.cross > k.chosen
    positive = k.cross > 0
    return {
        "sft": jnp.where(falls, jnp.abs(rate(with_sft)), 0.0),
        "ratio": jnp.where(positive, jnp.abs(rate(with_ratio)), 0.0),
        "dpop": jnp.where(falls, jnp.abs(rate(dpop(chosen + 0.3, rejected, beta, strength))), 0.0),  # type: ignore[arg-type]
        "dpo_shift": jnp.where(positive, jnp.abs(rate(shifted)), 0.0),
    }


@claim(
    "E6",
    "thresholds from K: at SFT weight, weight ratio, DPOP's lambda* = K+-/K++ - 1, DPO-Shift's f* the rate is 0",
    source="derived; arXiv 2402.13228, arXiv 2502.07599",
    status="exact",
    tolerance=1e-10,
)
def thresholds_stop_displacement(ctx: Context) -> Outcome:
    seen = sweep(ctx.key("E6"), ctx.instances, _at_threshold, SEQUENCE)
    errors = np.max(np.stack(list(seen.values())), axis=0)
    return error_outcome(errors)


@claim(
    "E2",
    "squeezing with fixed features: y- falls, and the most probable other token rises, with the largest ratio",
    source="arXiv 2407.10490",
    status="exact",
    tolerance=0.0,
)
def squeezing(ctx: Context) -> Outcome:
    def check(draw, vocabulary):
        pi = jax.nn.softmax(draw.normal((vocabulary,)) * jnp.exp(draw.uniform((), -1.0, 1.5)))
        pushed = draw.integers((), 0, vocabulary)
        seen = related.squeeze(pi, pushed, jnp.exp(draw.uniform((), -4.0, 3.0)))
        return {
            "clear": jnp.asarray(True),
            "y- rises": seen.log_ratio[pushed] >= 0,
            "target falls": seen.log_ratio[seen.target] <= 0,
            "another gains more": seen.log_ratio.max() > seen.log_ratio[seen.target],
        }

    return _disagreements(sweep(ctx.key("E2"), 6 * ctx.instances, check, [{"vocabulary": 5}, {"vocabulary": 40}]))


@claim(
    "E3",
    "learning dynamics: d ln pi = -eta A K G up to O(eta^2) (halving the step quarters the remainder)",
    source="arXiv 2407.10490",
    status="statistical",
    tolerance=0.1,
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

    slopes = sweep(ctx.key("E3"), ctx.instances, check, [{"vocabulary": 7, "width": 4}])
    return Outcome(value=abs(float(np.median(slopes)) - 2), n=len(slopes), detail={"order": float(np.median(slopes))})


@claim(
    "E4",
    "a pair is ranked rightly iff its DPO loss is below -ln sigma(-beta u_ref)",
    source="arXiv 2405.19534",
    status="exact",
    tolerance=0.0,
)
def ranking(ctx: Context) -> Outcome:
    def check(draw):
        u, ref = 20 * draw.normal((2,))
        beta = jnp.exp(draw.uniform((), -4.0, 0.0))
        loss = jax.nn.softplus(-beta * (u - ref))
        below = loss < related.ranking_threshold(ref, beta)
        # far in the flat tails both sides of the comparison round to the same number
        clear = jnp.abs(loss - related.ranking_threshold(ref, beta)) > NEAR * loss
        return {"clear": clear, "wrong": below != (u > 0)}

    return _disagreements(sweep(ctx.key("E4"), 100 * ctx.instances, check, [{}]))


@claim(
    "E4i",
    "the optimum of DPO under preference probability p has margin u_ref + ln(p/(1-p))/beta",
    source="arXiv 2405.19534",
    status="exact",
    tolerance=1e-12,
)
def idealised_policy(ctx: Context) -> Outcome:
    def check(draw):
        ref, beta, p = draw.normal(()), jnp.exp(draw.uniform((), -3.0, 1.0)), draw.uniform((), 0.02, 0.98)

        def expected_loss(u):
            z = beta * (u - ref)
            return p * jax.nn.softplus(-z) + (1 - p) * jax.nn.softplus(z)

        return jnp.abs(jax.grad(expected_loss)(related.idealised_log_ratio(ref, p, beta))) / beta

    return error_outcome(sweep(ctx.key("E4i"), ctx.instances, check, [{}]))


def _shift_errors(draw: Draw, **size: int) -> dict[str, Array]:
    i = instances.random_pair(draw, **size)
    both = stack(*i.pairs)
    k = kernel(i.model, both, both).total
    now = pair_log_probs(i.model, i.pairs)
    offsets = 3 * draw.normal((2,))
    beta, factor = jnp.asarray(0.1), jnp.asarray(0.75)

    def gap(reference):
        def loss(f):
            return lambda up, down: related.dpo_shift_loss(
                up[0] - now[0][0] + reference[0], down[0] - now[1][0] + reference[1], beta, f
            )

        by_flow = [rates_by_autodiff(i.model, i.pairs, loss(f), i.pairs.chosen)[0] for f in (factor, jnp.ones(()))]
        predicted = related.dpo_shift_gap(k[0, 1], (reference[0], reference[1]), beta, factor)
        return relative(predicted, by_flow[0] - by_flow[1], jnp.abs(k).max())

    return {"at the reference": gap(jnp.zeros(2)), "away": gap(offsets)}


@claim(
    "E5",
    "DPO-Shift gains (1 - f) beta sigma K+- on ln pi(y+) over DPO, at the reference",
    source="arXiv 2502.07599, Theorem 2.1",
    status="exact",
    tolerance=1e-10,
)
def dpo_shift(ctx: Context) -> Outcome:
    seen = sweep(ctx.key("E5"), ctx.instances, _shift_errors, SEQUENCE)
    found = error_outcome(seen["at the reference"])
    away = float(np.median(seen["away"]))
    return Outcome(value=found.value, n=found.n, detail={"median error with rewards of about 3 nats": away})


@claim(
    "E7",
    "in probabilities |dL/dpi-| / |dL/dpi+| = x+/x-; in log-probabilities the two are equal",
    source="arXiv 2406.07327",
    status="exact",
    tolerance=1e-10,
)
def probability_space(ctx: Context) -> Outcome:
    def check(draw):
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

    return error_outcome(sweep(ctx.key("E7"), ctx.instances, check, [{}]))


@claim(
    "E8",
    "after an early difference, a shared token is pushed down iff it is more probable after y+ (features 30% apart)",
    source="arXiv 2402.13228",
    status="statistical",
    tolerance=0.3,
)
def smaug_tokens(ctx: Context) -> Outcome:
    def check(draw, vocabulary, width):
        w, h = draw.normal((vocabulary, width)), draw.normal((width,))
        other = h + 0.3 * draw.normal((width,))
        token = draw.integers((), 0, vocabulary)
        p, q = jax.nn.softmax(w @ h)[token], jax.nn.softmax(w @ other)[token]
        # change of the token's logit after y+ through W, for equal incentives
        change = (1 - p) * (h @ h) - (1 - q) * (h @ other)
        return related.dpop_token_falls(p, q) != (change < 0)

    wrong = sweep(ctx.key("E8"), ctx.instances, check, [{"vocabulary": 8, "width": 6}])
    return Outcome(value=float(wrong.mean()), n=len(wrong), detail={"meaning": "share of tokens told wrongly"})
