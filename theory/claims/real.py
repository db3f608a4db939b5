"""Claims about a real model and its pairs: run by ``verify(model=..., pairs=...)``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from ches_jax.stats import bootstrap_spearman, spearman
from theory.claims.registry import Context, Outcome, bound, exact, largest, statistical, worst
from theory.models import kernels
from theory.models.lmview import both_sides, errors, log_probs, pair_log_probs, response_log_prob, states
from theory.models.real import BETA, FEW, RealModel
from theory.toy.dynamics import cumulative_prediction, optimise, torch_rmsprop

DISPLAYED = 14
"""Tokens of a response that a heat map can still label."""


def _first(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda a: a[:count], tree)


def _state(m: RealModel, params: Any, side: Any) -> Array:
    """The predicting states of one sequence."""
    return states(m.view, params, kernels.one_of(side))[0]


@exact(
    "F1",
    "head score = inner products of the true gradients by the unembedding (its output side, where it is tied)",
    "Theorem 6; ches_jax.scores.head_score",
    scope="model",
)
def head_score_is_a_gradient(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    w = m.view.unembedding(m.params)

    def gradient(side):
        hidden = _state(m, m.params, side)
        return jax.grad(lambda w: response_log_prob(m.view, hidden, w, side))(w)

    def one(pair):
        up, down = map(gradient, pair)
        return (up * down).sum(), (up**2).sum()

    cross, own = jax.jit(lambda pairs: jax.lax.map(one, pairs))(_first((m.chosen, m.rejected), FEW))
    score = m.head.score[: len(cross)]
    return largest(jnp.abs(score - (cross - own)) / jnp.maximum(jnp.abs(cross), own))


@exact(
    "K0m",
    "(*) on the model: the batch's rates by one backward and one forward pass = the full Gram matrix times incentives",
    "derived",
    scope="model",
)
def batch_rates_are_kernels(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    chosen, rejected = _first((m.chosen, m.rejected), FEW)
    n = len(chosen.tokens)

    def loss(up, down):
        # incentives that differ from pair to pair and from side to side
        return (jnp.arange(1.0, n + 1) * jax.nn.softplus(-0.1 * up + 0.07 * down)).mean()

    rates = jax.jit(lambda p, c, r: kernels.batch_rates(m.view, p, c, r, loss, c))(m.params, chosen, rejected)
    up, down = jax.grad(loss, argnums=(0, 1))(*(side[:n] for side in m.start))
    by_kernel = -(m.few_gram[:n] @ np.concatenate([up, down]))
    influence = BETA / 2 * (m.few_gram[:n, :n] - m.few_gram[:n, n:])
    error = worst(np.abs(rates - by_kernel)) / np.abs(by_kernel).max()
    return Outcome(value=error, n=n, figure={"influence": influence})


@exact("H0", "the head's Gram matrix without a gradient of W = its blocks of the head score", "derived", scope="model")
def head_gram_is_head_score(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    chosen, rejected = _first((m.chosen, m.rejected), FEW)
    n = len(chosen.tokens)
    both = both_sides(chosen, rejected)
    k = np.asarray(jax.jit(lambda p, s: kernels.head_gram(m.view, p, s))(m.params, both))
    own, cross = np.diagonal(k)[:n], np.diagonal(k[:n, n:])
    head, lowest = m.head, np.linalg.eigvalsh(k)[0] / np.trace(k)
    error = np.abs(own - head.sqnorm_chosen[:n]) + np.abs(cross - head.inner[:n])
    return Outcome(
        value=max(worst(error / own), -float(lowest)), n=n, detail={"smallest eigenvalue over the trace": float(lowest)}
    )


@statistical(
    "F6",
    "one step: predicted and measured change of ln pi(y+) agree, slope 1 +- 0.02, r > 0.99; SGD and a sign step",
    "first order",
    0.02,
    scope="model",
)
def one_step(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    velocities = {"SGD": m.velocity, "sign": jax.tree.map(jnp.sign, m.velocity)}
    detail, figure = {}, {}
    for name, velocity in velocities.items():
        rates = m.batch_rates if name == "SGD" else m.rates_along(velocity)
        # steps that change no log-probability by more than this, nats; the first of them is the claim's
        sizes = np.array([1e-3, 1e-2, 1e-1, 1.0])
        measured = np.stack([m.stepped(velocity, size / np.abs(rates).max()) for size in sizes])
        predicted = sizes[:, None] * rates / np.abs(rates).max()
        detail[name] = {
            "slope": float(predicted[0] @ measured[0] / (predicted[0] @ predicted[0])),
            "r": float(np.corrcoef(predicted[0], measured[0])[0, 1]),
        }
        wrong = np.median(np.abs(measured - predicted), axis=1)
        figure[name] = {"predicted": predicted[0], "measured": measured[0], "sizes": sizes, "wrong": wrong}
    off = max(abs(t["slope"] - 1) for t in detail.values())
    correlated = all(t["r"] > 0.99 for t in detail.values())
    return Outcome(value=off if correlated else np.inf, n=len(m.pairs), detail=detail, figure=figure)


@exact(
    "G2m",
    "on the model: the sum of <grad ln pi, update> along a run is the change of ln pi, for SGD, Adam and RMSProp",
    "derived",
    1e-3,
    scope="model",
)
def accumulated_prediction(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    chosen, rejected = _first((m.chosen, m.rejected), 2)
    # a step of SGD that changes a log-probability by a tenth of a nat at the most
    sgd = float(0.1 / np.abs(m.batch_rates).max())
    choices = {"SGD": optax.sgd(sgd), "Adam": optax.adam(1e-4), "RMSProp": torch_rmsprop(1e-5)}

    def of(params):
        return log_probs(m.view, params, chosen)

    objective = m.loss_of(2)

    def loss(params):
        return objective(*pair_log_probs(m.view, params, chosen, rejected))

    detail = {}
    for name, optimiser in choices.items():

        def run(params, optimiser=optimiser):
            path = optimise(loss, params, optimiser, 3)
            return cumulative_prediction(of, path), jax.lax.map(of, path)

        predicted, values = (np.asarray(a) for a in jax.jit(run)(m.params))
        measured = values - values[:1]
        detail[name] = {
            "error": float(np.abs(predicted - measured).max() / np.abs(measured).max()),
            "largest change": float(np.abs(measured).max()),
        }
    return Outcome(value=worst(np.array([t["error"] for t in detail.values()])), n=2, detail=detail)


def correlations(scores: dict[str, np.ndarray], target: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """Spearman's correlation of each score with a fall of ln pi(y+), with intervals."""
    return {name: bootstrap_spearman(values, target, seed=seed) for name, values in scores.items()}


@statistical(
    "F2",
    "the head score ranks own-pair rates better than CHES does (Spearman, with CHES and baselines beside it)",
    "Theorem 3; Definition 2; Section 5 of the paper",
    0.0,
    scope="model",
)
def scores_against_rates(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    falls = -m.own_rates
    table = correlations(m.scores | {"sign rate": -m.sign_rates, "batch rate": -m.batch_rates}, falls, ctx.seed)
    scores = m.scores
    difference = bootstrap_spearman(scores["head_score"], falls, seed=ctx.seed, less=scores["ches"])
    displaced = {"own": float((m.own_rates < 0).mean()), "batch": float((m.batch_rates < 0).mean())}
    detail = {"spearman": table, "head score less ches": difference, "share displaced at once": displaced}
    shown = {"own rate": m.own_rates, "batch rate": m.batch_rates, "head_score": scores["head_score"]}
    figure = {"spearman": table, "points": shown | {"ches": scores["ches"], "ufm_score": scores["ufm_score"]}}
    return Outcome(value=-difference["rho"], n=len(m.pairs), detail=detail, figure=figure)


@statistical(
    "F3",
    "the true rate of a pair goes with its finite training alone (5 steps of RMSProp); scores beside it",
    "Section 5 of the paper",
    0.0,
    scope="model",
)
def scores_against_training(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    change = m.train_alone(torch_rmsprop(1e-5), 5)
    rates = {"own rate": -m.own_rates, "sign rate": -m.sign_rates, "batch rate": -m.batch_rates}
    table = correlations(m.scores | rates, -change, ctx.seed)
    detail = {"spearman": table, "share displaced": float((change < 0).mean()), "mean change": float(change.mean())}
    names = ("ches", "ln_ches", "head_score", "last_hidden_inner", "minus_edit_distance")
    figure = {
        "spearman": table,
        "change": change,
        "scores": {n: m.scores[n] for n in names} | {"own rate": -m.own_rates},
    }
    return Outcome(value=-table["own rate"]["rho"], n=len(change), detail=detail, figure=figure)


@statistical(
    "F4",
    "|alpha| <= 2, and most inner products of hidden states positive (Appendix G.2: > 69% of alphas, > 99% of those)",
    "Theorem 6; Appendix G.2",
    0.5,
    scope="model",
)
def positivity(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    w = m.view.unembedding(m.params)

    def one(pair):
        hidden = [_state(m, m.params, side) for side in pair]
        residuals = [errors(m.view, h, w, side) for h, side in zip(hidden, pair, strict=True)]
        alpha, products = residuals[0] @ residuals[1].T, hidden[0] @ hidden[1].T
        cross = pair[0].response[1:, None] & pair[1].response[None, 1:]
        share = [(cross & (x > 0)).sum() / cross.sum() for x in (alpha, products, alpha * products)]
        return jnp.stack([jnp.where(cross, jnp.abs(alpha), 0.0).max(), *share]), alpha

    seen, alpha = (np.asarray(a) for a in jax.jit(lambda pairs: jax.lax.map(one, pairs))((m.chosen, m.rejected)))
    means = seen[:, 1:].mean(0)
    detail = {
        "largest |alpha|": float(seen[:, 0].max()),
        "alpha > 0": means[0],
        "<h,h'> > 0": means[1],
        "both": means[2],
    }
    in_range = seen[:, 0].max() <= 2 + 1e-12
    return Outcome(
        value=1 - float(means[1]) if in_range else np.inf, n=len(seen), detail=detail, figure=_heat_map(m, alpha)
    )


def _heat_map(m: RealModel, alpha: np.ndarray) -> dict[str, Any]:
    """The coefficients of one pair that is neither long nor trivial, with its tokens."""
    lengths = np.stack([np.asarray(side.response).sum(1) for side in (m.chosen, m.rejected)])
    fit = np.where(lengths.max(0) <= DISPLAYED, lengths.sum(0), -lengths.max(0))
    at = int(fit.argmax())
    counted = [np.flatnonzero(np.asarray(side.response)[at])[:DISPLAYED] for side in (m.chosen, m.rejected)]
    words = [
        [m.text(int(t)) for t in np.asarray(side.tokens)[at, where]]
        for side, where in zip((m.chosen, m.rejected), counted, strict=True)
    ]
    return {"alpha": alpha[at][np.ix_(counted[0] - 1, counted[1] - 1)], "chosen": words[0], "rejected": words[1]}


@statistical(
    "F5",
    "which tokens gain at the first difference: <W_z, W_y+ - W_y-> goes with the true rates, own pair",
    "Theorem 5; Table 13",
    0.0,
    scope="model",
)
def tokens_that_gain(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    w = m.view.unembedding(m.params)

    def one(pair):
        up_alone, down_alone = kernels.one_of(pair)
        at = jnp.argmax(pair[0].tokens != pair[1].tokens)

        def table(p):
            return jax.nn.log_softmax(m.view.transform(m.view.unembedding(p) @ _state(m, p, pair[0])[at - 1]))

        own = kernels.direction(m.view, m.params, up_alone, down_alone, lambda u, d: (0.5 * BETA * (d - u)).sum())
        gains = jax.jvp(table, (m.params,), (own,))[1]
        tokens = jnp.stack([side.tokens[at] for side in pair])
        up, difference = w[tokens[0]], w[tokens[0]] - w[tokens[1]]
        # the part of W_+ - W_- along W_+ against the part across it (Table 13)
        parallel = (difference @ up) / jnp.linalg.norm(up)
        across = jnp.sqrt(jnp.maximum(difference @ difference - parallel**2, 0.0))
        return {"gains": gains, "along": w @ difference, "shorter": jnp.abs(parallel) < across, "tokens": tokens}

    seen = jax.device_get(jax.jit(lambda pairs: jax.lax.map(one, pairs))(_first((m.chosen, m.rejected), 2 * FEW)))
    both = list(zip(seen["along"], seen["gains"], strict=True))
    rho = [spearman(a, g) for a, g in both]
    top = [len(set(np.argsort(-a)[:10]) & set(np.argsort(-g)[:10])) / 10 for a, g in both]
    detail = {
        "spearman over the vocabulary": float(np.mean(rho)),
        "overlap of the top 10": float(np.mean(top)),
        "along W_+ shorter than across it": float(seen["shorter"].mean()),
    }
    first = np.argsort(-seen["along"][0])[:15]
    figure = {
        "pair": [m.text(int(t)) for t in seen["tokens"][0]],
        "words": [m.text(int(t)) for t in first],
        "along": seen["along"][0][first],
        "gains": seen["gains"][0][first],
        "median gain": float(np.median(seen["gains"][0])),
    }
    return Outcome(value=-float(np.mean(rho)), n=len(rho), detail=detail, figure=figure)


@exact(
    "F7",
    "shares of K++ by module and layer add up to |grad ln pi(y+)|^2; the unembedding's is what a head score can see",
    "derived",
    scope="model",
)
def kernel_shares(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    total, cross, _ = (np.asarray(k) for k in m.grams.total())
    own = m.features[0]
    n = min(FEW, len(total))
    shares = {name: np.asarray(k) / total[:, None] for name, k in _as_layers(m.grams.chosen).items()}
    head = m.statistics["sqnorm_head"]
    detail = {
        "by module": {name: float(s.sum(1).mean()) for name, s in shares.items()},
        "output side of the unembedding": float((head / total).mean()),
        "body kernel over the features' (median)": float(np.median((total - head) / own)),
        "displaced by the true kernel": float((cross > total).mean()),
        "displaced by the unconstrained-features one": float((m.scores["ufm_score"] > 0).mean()),
    }
    figure = {"by layer": {name: s.mean(0) for name, s in shares.items()}}
    errors = np.abs(np.diagonal(m.few_gram)[:n] / total[:n] - 1)
    return Outcome(value=worst(errors), n=n, detail=detail, figure=figure)


def _as_layers(parts: dict[str, Array]) -> dict[str, Array]:
    """Every group with an axis of layers; of length 1 where it has none."""
    return {name: values.reshape(len(values), -1) for name, values in parts.items()}


@bound(
    "D1m",
    "on the model: displaced by its own pair => |grad ln pi(y-)| > |grad ln pi(y+)|, and never inverted",
    "derived (K is positive semidefinite)",
    0.0,
    scope="model",
)
def displaced_on_the_model(ctx: Context) -> Outcome:
    up, cross, down = (np.asarray(k) for k in ctx.model.grams.total())
    broken = ((cross > up) & (down <= up)) | ((cross > up) & (cross > down))
    return Outcome(value=float(broken.sum()), n=len(up), detail={"share displaced": float((cross > up).mean())})


@statistical(
    "F8",
    "the head score still goes with the rate through the body alone, the unembedding frozen",
    "derived: LoRA on attention and MLP leaves no gradient in W",
    0.0,
    scope="model",
)
def frozen_head(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    chosen, cross, _ = m.grams.by_group()
    body = sum(np.asarray(cross[g] - chosen[g]) for g in chosen if g not in ("head", "embed"))
    table = correlations(m.scores, np.asarray(body), ctx.seed)
    return Outcome(value=-table["head_score"]["rho"], n=len(m.pairs), detail={"spearman": table})
