"""Statements that are false as printed, or hold only under an assumption that is not printed: shown false.

The value is how wrong the printed text is, and has to be at least the tolerance. Most are measured beside the true
statements, on the same instances (``identities``).
"""

import jax
import jax.numpy as jnp
import numpy as np

from theory.claims.identities import errors_of
from theory.claims.registry import Check, Context, Outcome, median, refuted, share


def _printed(setting: str, key: str, outcome_of=median) -> Check:
    return lambda ctx: outcome_of(errors_of(ctx, setting)[key])


refuted("X5", "Theorem 5 as printed, with -l for -l'", "Theorem 5; missing prime", 0.05)(_printed("single", "X5"))
refuted(
    "X9",
    "Theorem 9 as printed, with l for l' in the sample's own term and in c",
    "Theorem 9; missing primes",
    0.05,
)(_printed("samples", "X9"))
refuted(
    "X67",
    "'-l(t) > 0' under Theorems 6 and 7: losses are not negative, so it never holds",
    "Theorems 6 and 7; missing primes",
    1.0,
)(_printed("sequence", "X67", share))
refuted("X6", "Theorem 6 verbatim for responses that begin alike", "remark after Theorem 6", 0.01)(
    _printed("shared", "X6")
)
refuted(
    "XG",
    "<W_y+, W_y-> measures how alike the two are: one shift reverses its sign between equal models",
    "Theorem 1; gauge",
    0.5,
)(_printed("single", "XG", share))


@refuted(
    "XP2",
    "Proposition 2's rho is a positive factor: negative for losses that overshoot, so rho E has not the sign of E",
    "Proposition 2",
    0.001,
)
def proposition_2_rho(ctx: Context) -> Outcome:
    seen = errors_of(ctx, "sequence")
    detail = {"rho is 0/0 or infinite": float(seen["XP2 undefined"].mean())}
    return Outcome(value=float(seen["XP2"].mean()), n=len(seen["XP2"]), detail=detail)


@refuted(
    "X1",
    "informal Theorem 1's quantity orders the rates (it drops a factor, and m varies)",
    "Theorem 1 (informal)",
    0.02,
)
def informal_theorem_1_order(ctx: Context) -> Outcome:
    seen = errors_of(ctx, "single")
    half = len(seen["X1 rate"]) // 2
    # neighbours in the list have nothing to do with one another, but are of one size
    higher, faster = (seen[k][0 : 2 * half : 2] > seen[k][1 : 2 * half : 2] for k in ("X1 informal", "X1 rate"))
    # a higher quantity should mean a lower rate
    return share(higher == faster)


@refuted(
    "XC",
    "CHES ranks single-token pairs: with every alpha at 1 it is 0 for all of them, while their rates differ",
    "Definition 2; Theorem 3 (informal)",
    0.1,
)
def ches_is_blind_to_the_last_token(ctx: Context) -> Outcome:
    seen = errors_of(ctx, "single")
    largest = float(np.abs(seen["XC ches"]).max())
    spread = float(np.std(seen["XC head"]))
    return Outcome(value=spread if largest == 0 else 0.0, n=len(seen["XC head"]), detail={"largest CHES": largest})


@refuted(
    "XL2",
    "Lemma 2 without a Lipschitz slope: l(u) = (1-u)_+^1.5 is convex and differentiable, and l' = 0 in finite time",
    "Lemma 2; counterexample derived",
    1e5,
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
