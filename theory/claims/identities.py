"""Claims that two expressions are one: the kernel identity, the theorems, the gauge.

Every check compares the displayed terms, added up, with autodiff (one backward, one forward-mode pass). Errors are
relative to |ell'| max(K++, |K+-|, K--), since the rate itself can be a small difference of large numbers. Theorems of
one setting share their instances and one compiled call.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses import LossInputs
from theory import instances, theorems
from theory.claims.registry import Context, Outcome, claim, error_outcome, sweep
from theory.instances import Draw, PairInstance
from theory.objectives import mean_of, of_library, plus_sft, sequence_losses, weighted
from theory.ufm import (
    Responses,
    descent,
    kernel,
    log_probs,
    pair_log_probs,
    rates,
    rates_by_autodiff,
    shift_gauge,
)

TINY = 1e-300
TOLERANCE = 1e-10
SINGLE = [{"vocabulary": 4, "width": 3}, {"vocabulary": 17, "width": 8}]
SEQUENCE = [{"vocabulary": 5, "width": 3, "length": 5}, {"vocabulary": 11, "width": 7, "length": 4}]
BATCH = [{"vocabulary": 4, "width": 3, "length": 4, "pairs": 4}]
SAMPLES = [{"vocabulary": 6, "width": 4, "prompts": 6}]

Errors = dict[str, Array]
"""Per claim: the error of each instance."""


def stack(*responses: Responses) -> Responses:
    """Several batches of responses as one."""
    return Responses(*(jnp.concatenate(parts) for parts in zip(*responses, strict=True)))


def relative(value: Array, truth: Array, scale: Array) -> Array:
    """Largest error in units of the scale; 0 where everything is 0."""
    return jnp.max(jnp.abs(value - truth)) / jnp.maximum(scale, TINY)


def kernel_scale(i: PairInstance, slope: Array, *others: Responses) -> Array:
    """|ell'| max |K| over all responses of the instance."""
    every = stack(*i.pairs, *others)
    return jnp.abs(slope).max() * jnp.abs(kernel(i.model, every, every).total).max()


def own_slope(i: PairInstance) -> Array:
    """Slope ell' at the only pair's margin."""
    chosen, rejected = pair_log_probs(i.model, i.pairs)
    return i.loss.slope((chosen - rejected)[0])


def truth(i: PairInstance, probe: Responses) -> Array:
    """Rates under the flow of Equation 2, by autodiff."""
    return rates_by_autodiff(i.model, i.pairs, mean_of(i.loss.ell), probe)


def token_rates(i: PairInstance) -> Array:
    """d/dt ln pi(z|x) for every prompt and token, by autodiff, [N, V]."""
    contexts = i.pairs.chosen.contexts[:, 0]

    def table(m):
        return jax.nn.log_softmax(m.features[contexts] @ m.unembedding.T, axis=-1)

    return jax.jvp(table, (i.model,), (descent(i.model, i.pairs, mean_of(i.loss.ell)),))[1]


def samples(i: PairInstance) -> tuple[Array, Array, Array, Array, Array]:
    """(h, y+, y-, ell', ell) of every sample of single tokens."""
    u = jnp.subtract(*pair_log_probs(i.model, i.pairs))
    h = i.model.features[i.pairs.chosen.contexts[:, 0]]
    tokens = (i.pairs.chosen.tokens[:, 0], i.pairs.rejected.tokens[:, 0])
    return h, *tokens, jax.vmap(i.loss.slope)(u), jax.vmap(i.loss.ell)(u)


def _batch(draw: Draw, **size: int) -> Errors:
    i = instances.random_batch(draw, **size)
    errors = []
    for loss in (mean_of(i.loss.ell), plus_sft(i.loss.ell, 0.3), weighted(i.loss.ell, 1.7, 0.6)):
        slopes = jnp.stack(jax.grad(loss, argnums=(0, 1))(*pair_log_probs(i.model, i.pairs)))
        expected = rates_by_autodiff(i.model, i.pairs, loss, i.probe)
        errors.append(relative(rates(i.model, i.pairs, loss, i.probe), expected, kernel_scale(i, slopes, i.probe)))
    return {"K0": jnp.stack(errors).max()}


def _library(draw: Draw, **size: int) -> Errors:
    i = instances.random_batch(draw, **size)
    noise = draw.normal((4, size["pairs"]))
    now = pair_log_probs(i.model, i.pairs)
    batch = LossInputs(
        ref_logp_chosen=now[0] + noise[0],
        ref_logp_rejected=now[1] + noise[1],
        chosen_tokens=i.pairs.chosen.mask.sum(1),
        rejected_tokens=i.pairs.rejected.mask.sum(1),
        rewards_chosen=noise[2],
        rewards_rejected=noise[3],
        kl_baseline=jnp.zeros(()),
    )
    totals = [of_library(loss, batch) for loss in sequence_losses()]

    def all_losses(chosen, rejected):
        return jnp.stack([total(chosen, rejected) for total in totals])

    # one Jacobian through the model for all losses: their gradients, end to end
    gradients = jax.jacrev(lambda m: all_losses(*pair_log_probs(m, i.pairs)))(i.model)
    expected = jax.vmap(lambda g: jax.jvp(lambda m: log_probs(m, i.probe), (i.model,), (g,))[1])(gradients)
    up, down = jax.jacrev(all_losses, argnums=(0, 1))(*now)
    k = [kernel(i.model, i.probe, side).total for side in i.pairs]
    found = up @ k[0].T + down @ k[1].T
    scale = jnp.maximum(jnp.abs(up).max(1), jnp.abs(down).max(1)) * kernel_scale(i, jnp.ones(1), i.probe)
    return {"K0L": (jnp.abs(found - expected).max(1) / jnp.maximum(scale, TINY)).max()}


def _single(draw: Draw, **size: int) -> Errors:
    i = instances.random_single_token(draw, **size)
    w, h, slope = i.model.unembedding, i.model.features[0], own_slope(i)
    p, m = i.pairs.chosen.tokens[0, 0], i.pairs.rejected.tokens[0, 0]
    expected, scale = token_rates(i)[0], kernel_scale(i, slope)
    ids = jnp.arange(w.shape[0], dtype=jnp.int32)
    # Theorem 5 leaves out the pair's own tokens
    others = (ids != p) & (ids != m)
    fifth = theorems.theorem_5(w, h, p, m, slope).total
    v = 3 * draw.normal((w.shape[1],))
    moved = i._replace(model=shift_gauge(i.model, v))
    centred = theorems.theorem_4_centred(w, h, p, m, slope)
    centred_moved = theorems.theorem_4_centred(moved.model.unembedding, h, p, m, slope)
    after_shift = jnp.maximum(scale, jnp.abs(slope) * (v @ v))
    gauge = [relative(token_rates(moved)[0], expected, after_shift)]
    gauge += [relative(centred_moved.terms[n], centred.terms[n], after_shift) for n in centred.terms]
    return {
        "T4": relative(theorems.theorem_4(w, h, p, m, slope).total, expected[p], scale),
        "T4c": relative(centred.total, expected[p], scale),
        "T4r": relative(theorems.rejected_rate(w, h, p, m, slope).total, expected[m], scale),
        "T5": relative(jnp.where(others, fifth, 0.0), jnp.where(others, expected, 0.0), scale),
        "MR": relative(theorems.margin_rate(w, h, p, m, slope), expected[p] - expected[m], scale),
        "D3": jnp.stack(gauge).max(),
    }


def _sequence(draw: Draw, **size: int) -> Errors:
    i = instances.random_pair(draw, **size)
    w, slope = i.model.unembedding, own_slope(i)
    chosen, rejected, probe = (theorems.response_of(i.model, r) for r in (*i.pairs, i.probe))
    every = stack(*i.pairs, i.probe)
    expected = truth(i, every)
    k = kernel(i.model, every, every).total
    scale = jnp.abs(slope) * jnp.abs(k).max()
    lp = pair_log_probs(i.model, i.pairs)
    up, down, weight = 1.7, 0.6, 0.37
    tilted = i.loss.slope(up * lp[0][0] - down * lp[1][0])
    first = theorems.proposition_1(k[0, 0], k[0, 1], slope, jnp.asarray(weight)).total
    second = theorems.proposition_2(k[0, 0], k[0, 1], tilted, jnp.asarray(up), jnp.asarray(down)).total
    flows = [
        rates_by_autodiff(i.model, i.pairs, loss, i.pairs.chosen)[0]
        for loss in (plus_sft(i.loss.ell, weight), weighted(i.loss.ell, up, down))
    ]
    size_of = jnp.maximum(jnp.maximum(jnp.abs(slope), jnp.abs(tilted)), weight) * jnp.abs(k).max()
    margin = -slope * (k[0, 0] - 2 * k[0, 1] + k[1, 1])
    return {
        "T6": relative(theorems.theorem_6(w, chosen, rejected, slope).total, expected[0], scale),
        "T7": relative(theorems.theorem_7(w, probe, chosen, rejected, slope).total, expected[2], scale),
        "MRs": relative(margin, expected[0] - expected[1], scale),
        "P1": relative(first, flows[0], size_of),
        "P2": relative(second, flows[1], size_of),
    }


def _shared(draw: Draw, **size: int) -> Errors:
    i = instances.random_pair(draw, shared=2, **size)
    slope = own_slope(i)
    chosen, rejected = (theorems.response_of(i.model, r) for r in i.pairs)
    value = theorems.theorem_6(i.model.unembedding, chosen, rejected, slope, shared=2).total
    return {"T6s": relative(value, truth(i, i.pairs.chosen)[0], kernel_scale(i, slope))}


def _samples(draw: Draw, **size: int) -> Errors:
    i = instances.random_single_token(draw, **size)
    h, yp, ym, slopes, _ = samples(i)
    n = h.shape[0]
    expected, scale = token_rates(i), kernel_scale(i, slopes) / n
    eighth = theorems.theorem_8(i.model.unembedding, h, yp, ym, slopes).total
    ninth = theorems.theorem_9(i.model.unembedding, h, yp, ym, slopes).total
    own = jnp.take_along_axis(expected, yp[:, None], axis=1)[:, 0]
    return {"T8": relative(eighth, own, scale), "T9": relative(ninth, expected, scale)}


SETTINGS: dict[str, tuple[Callable[..., Errors], list[dict[str, int]]]] = {
    "batch": (_batch, BATCH),
    "library": (_library, [BATCH[0] | {"pairs": 3}]),
    "single": (_single, SINGLE),
    "sequence": (_sequence, SEQUENCE),
    "shared": (_shared, SEQUENCE),
    "samples": (_samples, SAMPLES),
}


@lru_cache(maxsize=16)
def errors_of(setting: str, seed: int, count: int) -> Errors:
    """Errors of all claims of a setting; remembered, since several claims read it."""
    check, sizes = SETTINGS[setting]
    return sweep(Context(seed=seed).key(setting), count, check, sizes)


def _exact(id: str, setting: str, statement: str, source: str) -> None:
    @claim(id, statement, source=source, status="exact", tolerance=TOLERANCE)
    def check(ctx: Context) -> Outcome:
        return error_outcome(errors_of(setting, ctx.seed, ctx.instances)[id])


_exact(
    "K0", "batch", "(*): kernel times incentives is the rate; repeated prompts, any prefixes, SFT, weights", "derived"
)
_exact("K0L", "library", "(*) for every loss of ches_jax.losses that reads whole responses", "derived")
_exact("T4", "single", "Theorem 4: single tokens, the chosen token's rate is -l'[m + S]", "Theorem 4")
_exact("T4c", "single", "Theorem 4 in the centred gauge", "derived")
_exact("T4r", "single", "the rejected token's rate is Theorem 4 with the roles exchanged", "derived")
_exact("T5", "single", "Theorem 5: the rates of all other tokens", "Theorem 5, l' for the printed l")
_exact("T6", "sequence", "Theorem 6: sequences, the chosen response's rate", "Theorem 6")
_exact("T6s", "shared", "Theorem 6 for responses that begin alike", "derived (the paper leaves it to the reader)")
_exact("T7", "sequence", "Theorem 7: a response that begins with a third token", "Theorem 7")
_exact("T8", "samples", "Theorem 8: several prompts, the chosen tokens' rates", "Theorem 8")
_exact("T9", "samples", "Theorem 9: several prompts, every token's rate", "Theorem 9, l' for the printed l")
_exact("P1", "sequence", "Proposition 1: an SFT term adds lambda |grad ln pi(y+)|^2", "Proposition 1")
_exact(
    "P2", "sequence", "Proposition 2 in the form -lambda- mu'(K++ - K+-) - (lambda+ - lambda-) mu' K++", "Proposition 2"
)
_exact("MR", "single", "the margin's rate is -l'(|W_+ - W_-|^2 + 2|h|^2) for single tokens", "derived")
_exact("MRs", "sequence", "the margin's rate is -l' |grad ln pi(y+) - grad ln pi(y-)|^2", "derived")
_exact("D3", "single", "W + 1 v^T changes no rate, and no term of the centred form", "derived")
