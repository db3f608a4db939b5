"""Statements that are false as printed, or hold only under an assumption that is not printed: shown false.

The value is how wrong the printed text is, and has to be at least the tolerance.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theory import instances, theorems
from theory.claims.identities import (
    SAMPLES,
    SEQUENCE,
    SINGLE,
    kernel_scale,
    own_slope,
    relative,
    samples,
    stack,
    token_rates,
    truth,
)
from theory.claims.registry import Context, Outcome, claim, sweep
from theory.theorems import response_of
from theory.ufm import kernel, pair_log_probs


def median_outcome(values: Any, **detail: float) -> Outcome:
    """The median of how wrong the printed text is."""
    values = np.asarray(values)
    return Outcome(value=float(np.median(values)), n=len(values), detail={"largest": float(values.max()), **detail})


@claim(
    "X5",
    "Theorem 5 as printed, with -l for -l'",
    source="Theorem 5; missing prime",
    status="refuted as printed",
    tolerance=0.05,
)
def theorem_5_printed(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_single_token(draw, **size)
        p, m = i.pairs.chosen.tokens[0, 0], i.pairs.rejected.tokens[0, 0]
        w, h, slope = i.model.unembedding, i.model.features[0], own_slope(i)
        ell = i.loss.ell(jnp.subtract(*pair_log_probs(i.model, i.pairs))[0])
        ids = jnp.arange(w.shape[0], dtype=jnp.int32)
        others = (ids != p) & (ids != m)
        printed = theorems.theorem_5(w, h, p, m, slope, loss=ell, printed=True).total
        error = relative(jnp.where(others, printed, 0.0), jnp.where(others, token_rates(i)[0], 0.0), jnp.ones(()))
        return error / jnp.maximum(kernel_scale(i, slope), 1e-3)

    return median_outcome(sweep(ctx.key("X5"), ctx.instances, check, SINGLE))


@claim(
    "X9",
    "Theorem 9 as printed, with l for l' in the sample's own term and in c",
    source="Theorem 9; missing primes",
    status="refuted as printed",
    tolerance=0.05,
)
def theorem_9_printed(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_single_token(draw, **size)
        h, yp, ym, slopes, losses = samples(i)
        printed = theorems.theorem_9(i.model.unembedding, h, yp, ym, slopes, losses=losses, printed=True).total
        return relative(printed, token_rates(i), kernel_scale(i, slopes) / h.shape[0] + 1e-3)

    return median_outcome(sweep(ctx.key("X9"), ctx.instances, check, SAMPLES))


@claim(
    "X67",
    "'-l(t) > 0' under Theorems 6 and 7: losses are not negative, so it never holds",
    source="Theorems 6 and 7; missing primes",
    status="refuted as printed",
    tolerance=1.0,
)
def positive_loss(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_pair(draw, **size)
        return i.loss.ell(jnp.subtract(*pair_log_probs(i.model, i.pairs))[0]) >= 0

    share = sweep(ctx.key("X67"), ctx.instances, check, SEQUENCE)
    return Outcome(value=float(share.mean()), n=len(share))


@claim(
    "X6",
    "Theorem 6 verbatim for responses that begin alike",
    source="remark after Theorem 6",
    status="refuted as printed",
    tolerance=0.01,
)
def theorem_6_on_shared_prefixes(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_pair(draw, shared=1, **size)
        slope = own_slope(i)
        chosen, rejected = (response_of(i.model, r) for r in i.pairs)
        value = theorems.theorem_6(i.model.unembedding, chosen, rejected, slope).total
        return relative(value, truth(i, i.pairs.chosen)[0], kernel_scale(i, slope))

    return median_outcome(sweep(ctx.key("X6"), ctx.instances, check, SEQUENCE))


@claim(
    "XP2",
    "Proposition 2's rho is a positive factor: negative for losses that overshoot, so rho E has not the sign of E",
    source="Proposition 2",
    status="refuted as printed",
    tolerance=0.001,
)
def proposition_2_rho(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_pair(draw, **size)
        both = stack(*i.pairs)
        k = kernel(i.model, both, both).total
        chosen, rejected = pair_log_probs(i.model, i.pairs)
        lengths = [r.mask.sum().astype(chosen.dtype) for r in i.pairs]
        up, down = 1 / lengths[0], 1 / lengths[1]
        slope = i.loss.slope(chosen[0] - rejected[0])
        tilted = i.loss.slope(up * chosen[0] - down * rejected[0])
        printed = theorems.proposition_2(k[0, 0], k[0, 1], tilted, up, down, slope=slope, printed=True)
        sound = theorems.proposition_2(k[0, 0], k[0, 1], tilted, up, down)
        own = -slope * (k[0, 0] - k[0, 1])
        return {
            "flipped": sound.terms["rho_E"] * own < 0,
            "undefined": ~jnp.isfinite(printed.total),
        }

    seen = sweep(ctx.key("XP2"), ctx.instances, check, SEQUENCE)
    flipped = float(seen["flipped"].mean())
    return Outcome(
        value=flipped, n=len(seen["flipped"]), detail={"rho is 0/0 or infinite": float(seen["undefined"].mean())}
    )


@claim(
    "X1",
    "informal Theorem 1's quantity orders the rates (it drops a factor, and m varies)",
    source="Theorem 1 (informal)",
    status="refuted as printed",
    tolerance=0.02,
)
def informal_theorem_1_order(ctx: Context) -> Outcome:
    def check(draw, vocabulary, width):
        i = instances.random_single_token(draw, vocabulary=vocabulary, width=width)
        w, h = i.model.unembedding, i.model.features[0]
        zero, one = jnp.int32(0), jnp.int32(1)
        rate = theorems.theorem_4(w, h, zero, one, jnp.asarray(-1.0)).total
        return {"informal": theorems.informal_theorem_1(w, h, zero, one), "rate": rate}

    seen = sweep(ctx.key("X1"), ctx.instances, check, [{"vocabulary": 8, "width": 4}])
    informal, rate = seen["informal"], seen["rate"]
    half = len(rate) // 2
    wrong = (informal[:half] > informal[half : 2 * half]) & (rate[:half] > rate[half : 2 * half])
    other = (informal[:half] < informal[half : 2 * half]) & (rate[:half] < rate[half : 2 * half])
    return Outcome(value=float((wrong | other).mean()), n=half, detail={"meaning": "share of pairs in the wrong order"})


@claim(
    "XG",
    "<W_y+, W_y-> measures how alike the two are: it changes sign between equal models",
    source="Theorem 1; gauge",
    status="refuted as printed",
    tolerance=0.5,
)
def alignment_is_no_invariant(ctx: Context) -> Outcome:
    def check(draw, vocabulary, width):
        i = instances.random_single_token(draw, vocabulary=vocabulary, width=width)
        w = i.model.unembedding
        before = w[0] @ w[1]
        # along W_+ + W_-, half-way back the product is -|W_+ - W_-|^2 / 4, and far ahead it is positive
        direction = w[0] + w[1]
        size = jnp.linalg.norm(direction)
        shift = jnp.where(before > 0, -0.5 * size, size + 2 * jnp.sqrt(jnp.abs(before)))
        moved = w + (shift * direction / size)[None, :]
        return (moved[0] @ moved[1]) * before < 0

    flips = sweep(ctx.key("XG"), ctx.instances, check, [{"vocabulary": 6, "width": 4}])
    return Outcome(value=float(flips.mean()), n=len(flips), detail={"meaning": "share whose sign one shift reverses"})


@claim(
    "XC",
    "CHES ranks single-token pairs: with every alpha at 1 it is 0 for all of them, while their rates differ",
    source="Definition 2; Theorem 3 (informal)",
    status="refuted as printed",
    tolerance=0.1,
)
def ches_is_blind_to_the_last_token(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_single_token(draw, **size)
        chosen, rejected = (response_of(i.model, r) for r in i.pairs)
        sums = chosen.hidden.sum(0), rejected.hidden.sum(0)
        score = sums[0] @ (sums[1] - sums[0])
        w = i.model.unembedding
        exact = theorems.feature_terms(w, chosen, rejected) - theorems.feature_terms(w, chosen, chosen)
        return {"ches": jnp.abs(score), "head score": -exact / (sums[0] @ sums[0])}

    seen = sweep(ctx.key("XC"), ctx.instances, check, SINGLE)
    spread = float(np.std(seen["head score"]))
    return Outcome(value=spread if seen["ches"].max() == 0 else 0.0, n=len(seen["ches"]), detail={"CHES": 0.0})


@claim(
    "XL2",
    "Lemma 2 without a Lipschitz slope: l(u) = (1-u)_+^1.5 is convex and differentiable, and l' = 0 in finite time",
    source="Lemma 2; counterexample derived",
    status="refuted as printed",
    tolerance=1e5,
)
def lemma_2_counterexample(ctx: Context) -> Outcome:
    """The margin obeys du/dt = -l'(u) c with c bounded below; here in its own coordinate with c = 2."""

    def gap(power: float, steps: int = 20000, time: float = 1.0) -> float:
        def euler(u, _):
            return u - time / steps * 2 * jax.grad(lambda u: jnp.maximum(1 - u, 0.0) ** power)(u), None

        return float(1 - jax.lax.scan(euler, jnp.zeros(()), None, length=steps)[0])

    rough, smooth = abs(gap(1.5)), gap(2.0)
    # Euler's last step lands on the optimum up to the step's own size; the smooth loss never gets there
    return Outcome(
        value=smooth / max(rough, 1e-300), n=1, detail={"gap with power 1.5": rough, "gap with power 2": smooth}
    )
