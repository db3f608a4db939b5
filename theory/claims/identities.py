"""Claims that two expressions are one: the kernel identity, the theorems, the gauge.

Every check compares the displayed terms, added up, with autodiff (one backward, one forward-mode pass). Errors are
relative to |ell'| max(K++, |K+-|, K--), since the rate itself can be a small difference of large numbers. Statements of
one setting share their instances and one compiled call; what is printed wrongly is measured there too (``errata``).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses import LossInputs, RunningMean
from ches_jax.scores.formulas import ches
from theory.claims.registry import exact, largest, shared_sweeps
from theory.statements import theorems
from theory.statements.coefficients import coefficients, head_score
from theory.statements.objectives import library_losses, mean_of, of_library, plus_sft, weighted
from theory.toy import instances
from theory.toy.instances import Draw, PairInstance
from theory.toy.ufm import (
    Responses,
    descent,
    flow_rates,
    gram,
    pair_log_probs,
    rates,
    rates_by_autodiff,
    shift_gauge,
    stack,
    token_kernel,
    token_log_probs,
)

TINY = 1e-300
TOLERANCE = 1e-10
SINGLE = [{"vocabulary": 4, "width": 3}, {"vocabulary": 17, "width": 8}]
SEQUENCE = [{"vocabulary": 5, "width": 3, "length": 5}, {"vocabulary": 11, "width": 7, "length": 4}]
BATCH = [{"vocabulary": 4, "width": 3, "length": 4, "pairs": 4}]
SAMPLES = [{"vocabulary": 6, "width": 4, "prompts": 6}]

Errors = dict[str, Array]
"""Per claim: the error of each instance; for errata, whatever the claim compares."""


def relative(value: Array, truth: Array, scale: Array) -> Array:
    """Largest error in units of the scale; 0 where everything is 0."""
    return jnp.max(jnp.abs(value - truth)) / jnp.maximum(scale, TINY)


def kernel_scale(i: PairInstance, slope: Array, *others: Responses) -> Array:
    """|ell'| max |K| over all responses of the instance."""
    return jnp.abs(slope).max() * jnp.abs(gram(i.model, *i.pairs, *others)).max()


def margin(i: PairInstance) -> Array:
    """The only pair's margin u."""
    chosen, rejected = pair_log_probs(i.model, i.pairs)
    return (chosen - rejected)[0]


def own_slope(i: PairInstance) -> Array:
    """Slope ell' at the only pair's margin."""
    return i.loss.slope(margin(i))


def truth(i: PairInstance, probe: Responses) -> Array:
    """Rates under the flow of Equation 2, by autodiff."""
    return flow_rates(i.model, i.pairs, [mean_of(i.loss.ell)], probe)[0]


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
    losses = [mean_of(i.loss.ell), plus_sft(i.loss.ell, 0.3), weighted(i.loss.ell, 1.7, 0.6)]
    errors = []
    for loss, expected in zip(losses, flow_rates(i.model, i.pairs, losses, i.probe), strict=True):
        slopes = jnp.stack(jax.grad(loss, argnums=(0, 1))(*pair_log_probs(i.model, i.pairs)))
        errors.append(relative(rates(i.model, i.pairs, loss, i.probe), expected, kernel_scale(i, slopes, i.probe)))
    return {"K0": jnp.stack(errors).max()}


def _library(draw: Draw, **size: int) -> Errors:
    """Every loss of the library: the probes are also the sampled responses of the losses that have candidates."""
    i = instances.random_batch(draw, **size)
    sides = (*i.pairs, i.probe)
    now = [token_log_probs(i.model, side) for side in sides]
    # references and the side inputs of losses, near the present values
    reference = [jnp.where(side.mask, x + draw.normal(x.shape), 0.0) for side, x in zip(sides, now, strict=True)]
    side_inputs = draw.uniform((8, *now[0].shape))
    rewards = draw.normal((2, size["pairs"]))
    batch = LossInputs(
        ref_logp_chosen=reference[0].sum(-1),
        ref_logp_rejected=reference[1].sum(-1),
        ref_logp_joint_chosen=reference[0].sum(-1),
        ref_logp_joint_rejected=reference[1].sum(-1),
        ref_logp_candidates=reference[2].sum(-1)[:, None],
        ref_logp_responses=jnp.stack([r.sum(-1) for r in reference], axis=-1),
        response_mask=jnp.ones((size["pairs"], 3)),
        response_tokens=jnp.stack([side.mask.sum(1) for side in sides], axis=-1),
        scores=jnp.sort(draw.normal((size["pairs"], 3)))[:, ::-1],
        chosen_tokens=i.pairs.chosen.mask.sum(1),
        rejected_tokens=i.pairs.rejected.mask.sum(1),
        rewards_chosen=rewards[0],
        rewards_rejected=rewards[1],
        reward_mean=RunningMean(jnp.zeros(()), jnp.ones(())),
        kl_baseline=jnp.zeros(()),
        ref_token_logps_chosen=reference[0],
        ref_token_logps_rejected=reference[1],
        token_mask_chosen=i.pairs.chosen.mask,
        token_mask_rejected=i.pairs.rejected.mask,
        token_weights_chosen=side_inputs[0],
        token_weights_rejected=side_inputs[1],
        token_kl_chosen=side_inputs[2],
        token_kl_rejected=side_inputs[3],
        reward_mask_chosen=side_inputs[4],
        reward_mask_rejected=side_inputs[5],
        kl_mask_chosen=side_inputs[6],
        kl_mask_rejected=side_inputs[7],
        activation_mask_chosen=side_inputs[4],
        activation_mask_rejected=side_inputs[5],
    )
    totals = [of_library(loss, batch) for loss in library_losses()]

    def all_losses(*token_values):
        return jnp.stack([total(*token_values) for total in totals])

    def of_model(m):
        return all_losses(*(token_log_probs(m, side) for side in sides))

    expected = rates_by_autodiff(i.model, of_model, i.probe)
    slopes = jax.jacrev(all_losses, argnums=(0, 1, 2))(*now)
    kernels = [token_kernel(i.model, i.probe, side).total for side in sides]
    rates = -sum(jnp.einsum("lnt,ant->la", d, k) for d, k in zip(slopes, kernels, strict=True))
    largest_slope = jnp.stack([jnp.abs(d).max((1, 2)) for d in slopes]).max(0)
    scale = largest_slope * jnp.stack([jnp.abs(k).max() for k in kernels]).max()
    return {"K0L": (jnp.abs(rates - expected).max(1) / jnp.maximum(scale, TINY)).max()}


def _single(draw: Draw, **size: int) -> Errors:
    i = instances.random_single_token(draw, **size)
    w, h, slope = i.model.unembedding, i.model.features[0], own_slope(i)
    p, m = i.pairs.chosen.tokens[0, 0], i.pairs.rejected.tokens[0, 0]
    expected, scale = token_rates(i)[0], kernel_scale(i, slope)
    ids = jnp.arange(w.shape[0], dtype=jnp.int32)

    def error_on_others(rate):
        # Theorem 5 leaves out the pair's own tokens
        others = (ids != p) & (ids != m)
        return relative(jnp.where(others, rate, 0.0), jnp.where(others, expected, 0.0), scale)

    v = 3 * draw.normal((w.shape[1],))
    moved = i._replace(model=shift_gauge(i.model, v))
    centred = theorems.theorem_4_centred(w, h, p, m, slope)
    centred_moved = theorems.theorem_4_centred(moved.model.unembedding, h, p, m, slope)
    after_shift = jnp.maximum(scale, jnp.abs(slope) * (v @ v))
    gauge = [relative(token_rates(moved)[0], expected, after_shift)]
    gauge += [relative(centred_moved.terms[n], centred.terms[n], after_shift) for n in centred.terms]
    pair = [theorems.response_of(i.model, r) for r in i.pairs]
    sums = [r.hidden.sum(0) for r in pair]
    return {
        "T4": relative(theorems.theorem_4(w, h, p, m, slope).total, expected[p], scale),
        "T4c": relative(centred.total, expected[p], scale),
        "T4r": relative(theorems.rejected_rate(w, h, p, m, slope).total, expected[m], scale),
        "T5": error_on_others(theorems.theorem_5(w, h, p, m, slope).total),
        "MR": relative(theorems.margin_rate(w, h, p, m, slope), expected[p] - expected[m], scale),
        "D3": jnp.stack(gauge).max(),
        "X5": error_on_others(theorems.theorem_5(w, h, p, m, slope, loss=i.loss.ell(margin(i)), printed=True).total),
        "X1 rate": theorems.theorem_4(w, h, p, m, jnp.asarray(-1.0)).total,
        "X1 informal": theorems.informal_theorem_1(w, h, p, m),
        "XG": _alignment_reversed(w[p], w[m]),
        "XC ches": ches(sums[0] @ sums[1], sums[0] @ sums[0]),
        "XC head": head_score(w, *pair) / (h @ h),
    }


def _alignment_reversed(up: Array, down: Array) -> Array:
    """Whether <W_y+, W_y-> changes sign under a shift of all unembeddings that changes no probability."""
    before, direction = up @ down, up + down
    size = jnp.linalg.norm(direction)
    # along W_+ + W_-, half-way back the product is -|W_+ - W_-|^2 / 4, and far ahead it is positive
    shift = jnp.where(before > 0, -0.5 * size, size + 2 * jnp.sqrt(jnp.abs(before))) * direction / size
    return ((up + shift) @ (down + shift)) * before < 0


def _sequence(draw: Draw, **size: int) -> Errors:
    i = instances.random_pair(draw, **size)
    w, slope = i.model.unembedding, own_slope(i)
    chosen, rejected, probe = (theorems.response_of(i.model, r) for r in (*i.pairs, i.probe))
    responses = stack(*i.pairs, i.probe)
    k = gram(i.model, responses)
    scale = jnp.abs(slope) * jnp.abs(k).max()
    lp = pair_log_probs(i.model, i.pairs)
    up, down, weight = 1.7, 0.6, 0.37
    losses = [mean_of(i.loss.ell), plus_sft(i.loss.ell, weight), weighted(i.loss.ell, up, down)]
    expected, with_sft, with_weights = flow_rates(i.model, i.pairs, losses, responses)
    tilted = i.loss.slope(up * lp[0][0] - down * lp[1][0])
    first = theorems.proposition_1(k[0, 0], k[0, 1], slope, jnp.asarray(weight)).total
    second = theorems.proposition_2(k[0, 0], k[0, 1], tilted, jnp.asarray(up), jnp.asarray(down)).total
    unit = theorems.theorem_6(w, chosen, rejected, jnp.asarray(-1.0)).terms
    size_of = jnp.maximum(jnp.maximum(jnp.abs(slope), jnp.abs(tilted)), weight) * jnp.abs(k).max()
    own = coefficients(w, chosen, chosen)
    incentives = jnp.exp(draw.uniform((2,), -3.0, 3.0))
    return {
        "T6": relative(theorems.theorem_6(w, chosen, rejected, slope).total, expected[0], scale),
        "T7": relative(theorems.theorem_7(w, probe, chosen, rejected, slope).total, expected[2], scale),
        "MRs": relative(-slope * (k[0, 0] - 2 * k[0, 1] + k[1, 1]), expected[0] - expected[1], scale),
        "P1": relative(first, with_sft[0], size_of),
        "P2": relative(second, with_weights[0], size_of),
        "A5 -alpha_plus": -unit["alpha_plus"],
        "A5 -m": -(unit["m_chosen_norm"] + unit["m_rejected_norm"] + unit["m_later_tokens"]),
        "A5 negative": (own.real & (own.alpha < 0)).sum() / own.real.sum(),
        "D1i": inverted(k, incentives[0], incentives[1]),
        "X67": i.loss.ell(margin(i)) >= 0,
        **_rho(i, k, slope),
    }


def inverted(k: Array, up: Array, down: Array) -> Array:
    """How clearly y+ falls while y- rises; positive iff they do."""
    chosen, rejected = up * k[0, 0] - down * k[0, 1], up * k[0, 1] - down * k[1, 1]
    return jnp.minimum(-chosen, rejected) / (jnp.maximum(up, down) * jnp.abs(k[:2, :2]).max())


def _rho(i: PairInstance, k: Array, slope: Array) -> Errors:
    """Proposition 2 with weights 1/|y|: whether rho flips the sign of E, and whether it is defined."""
    chosen, rejected = pair_log_probs(i.model, i.pairs)
    up, down = (1 / r.mask.sum().astype(chosen.dtype) for r in i.pairs)
    tilted = i.loss.slope(up * chosen[0] - down * rejected[0])
    printed = theorems.proposition_2(k[0, 0], k[0, 1], tilted, up, down, slope=slope, printed=True)
    sound = theorems.proposition_2(k[0, 0], k[0, 1], tilted, up, down)
    return {
        "XP2": sound.terms["rho_E"] * (-slope * (k[0, 0] - k[0, 1])) < 0,
        "XP2 undefined": ~jnp.isfinite(printed.total),
    }


def _shared(draw: Draw, **size: int) -> Errors:
    """Pairs that begin alike; and pairs that do not, with a response that begins like the chosen one."""
    alike = instances.random_pair(draw, shared=2, **size)
    branching = instances.random_pair(draw, probe_shared=2, **size)
    parts = []
    for i, probe in ((alike, alike.pairs.chosen), (branching, branching.probe)):
        slope = own_slope(i)
        rows = [theorems.response_of(i.model, r) for r in (*i.pairs, i.probe)]
        parts.append((slope, rows, i.model.unembedding, truth(i, probe)[0], kernel_scale(i, slope, probe)))
    slope, (chosen, rejected, _), w, expected, scale = parts[0]
    errors = {
        "T6s": relative(theorems.theorem_6(w, chosen, rejected, slope, shared=2).total, expected, scale),
        "X6": relative(theorems.theorem_6(w, chosen, rejected, slope).total, expected, scale),
    }
    slope, (chosen, rejected, probe), w, expected, scale = parts[1]
    seventh = theorems.theorem_7_shared(w, probe, chosen, rejected, slope, shared=2)
    return errors | {"T7s": relative(seventh.total, expected, scale)}


def _samples(draw: Draw, **size: int) -> Errors:
    i = instances.random_single_token(draw, **size)
    w = i.model.unembedding
    h, yp, ym, slopes, losses = samples(i)
    expected, scale = token_rates(i), kernel_scale(i, slopes) / h.shape[0]
    own = jnp.take_along_axis(expected, yp[:, None], axis=1)[:, 0]
    printed = theorems.theorem_9(w, h, yp, ym, slopes, losses=losses, printed=True).total
    return {
        "T8": relative(theorems.theorem_8(w, h, yp, ym, slopes).total, own, scale),
        "T9": relative(theorems.theorem_9(w, h, yp, ym, slopes).total, expected, scale),
        "X9": relative(printed, expected, scale),
    }


SETTINGS: dict[str, tuple[Callable[..., Errors], list[dict[str, int]]]] = {
    "batch": (_batch, BATCH),
    "library": (_library, [BATCH[0] | {"pairs": 3}]),
    "single": (_single, SINGLE),
    "sequence": (_sequence, SEQUENCE),
    "shared": (_shared, SEQUENCE),
    "samples": (_samples, SAMPLES),
}


errors_of = shared_sweeps(SETTINGS)


def _same(id: str, setting: str, statement: str, source: str) -> None:
    exact(id, statement, source)(lambda ctx: largest(errors_of(ctx, setting)[id]))


_same(
    "K0",
    "batch",
    "identity (*): the rate is kernel times incentives; any prefixes, repeated prompts, SFT, weights",
    "derived",
)
_same("K0L", "library", "identity (*) for every loss of ches_jax, by tokens where the loss reads tokens", "derived")
_same("T4", "single", "Theorem 4: single tokens, the chosen token's rate is -l'[m + S]", "Theorem 4")
_same("T4c", "single", "Theorem 4 in the centred gauge", "derived")
_same("T4r", "single", "the rejected token's rate is Theorem 4 with the roles exchanged", "derived")
_same("T5", "single", "Theorem 5: the rates of all other tokens", "Theorem 5, l' for the printed l")
_same("T6", "sequence", "Theorem 6: sequences, the chosen response's rate", "Theorem 6")
_same("T6s", "shared", "Theorem 6 for responses that begin alike", "derived (the paper leaves it to the reader)")
_same("T7", "sequence", "Theorem 7: a response that begins with a third token", "Theorem 7")
_same("T7s", "shared", "Theorem 7 for a response that begins like the chosen one", "derived (the paper: extra terms)")
_same("T8", "samples", "Theorem 8: several prompts, the chosen tokens' rates", "Theorem 8")
_same("T9", "samples", "Theorem 9: several prompts, every token's rate", "Theorem 9, l' for the printed l")
_same("P1", "sequence", "Proposition 1: an SFT term adds lambda |grad ln pi(y+)|^2", "Proposition 1")
_same(
    "P2", "sequence", "Proposition 2 in the form -lambda- mu'(K++ - K+-) - (lambda+ - lambda-) mu' K++", "Proposition 2"
)
_same("MR", "single", "the margin's rate is -l'(|W_+ - W_-|^2 + 2|h|^2) for single tokens", "derived")
_same("MRs", "sequence", "the margin's rate is -l' |grad ln pi(y+) - grad ln pi(y-)|^2", "derived")
_same("D3", "single", "W + 1 v^T changes no rate, and no term of the centred form", "derived")
