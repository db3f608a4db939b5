"""Claims about a real model and its pairs: run by ``verify(model=..., pairs=...)``."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ches_jax.scores.derive import spearman
from theory import kernels
from theory.claims.registry import Context, Outcome, claim, worst
from theory.dynamics import torch_rmsprop
from theory.lmview import log_probs, response_log_prob
from theory.real import BETA, RealModel, bootstrap_spearman
from theory.ufm import residual

FEW = 6
"""Pairs where a claim costs a gradient of the unembedding or a Jacobian for each."""


def _first(tree, count: int):
    return jax.tree.map(lambda a: a[:count], tree)


@claim(
    "F1",
    "head score = inner products of the true gradients by the unembedding (its output side, where it is tied)",
    source="Theorem 6; ches_jax.scores.head",
    status="exact",
    scope="model",
    tolerance=1e-10,
)
def head_score_is_a_gradient(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    w = m.view.unembedding(m.params)

    def one(pair):
        grads = []
        for side in pair:
            hidden = m.view.hidden(m.params, jax.tree.map(lambda a: a[None], side))[0, :-1]
            grads.append(jax.grad(lambda w, h=hidden, s=side: response_log_prob(m.view, h, w, s))(w))
        return (grads[0] * grads[1]).sum(), (grads[0] ** 2).sum()

    cross, own = jax.jit(lambda pairs: jax.lax.map(one, pairs))(_first((m.chosen, m.rejected), FEW))
    score = m.head.score[: len(cross)]
    errors = jnp.abs(score - (cross - own)) / jnp.maximum(jnp.abs(cross), own)
    return Outcome(value=worst(errors), n=len(cross))


@claim(
    "K0m",
    "(*) on the model: the batch's rates by one backward and one forward pass = the full Gram matrix times incentives",
    source="derived",
    status="exact",
    scope="model",
    tolerance=1e-10,
)
def batch_rates_are_kernels(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    chosen, rejected = _first((m.chosen, m.rejected), 3)

    def loss(up, down):
        # incentives that differ from pair to pair and from side to side
        return (jnp.arange(1.0, 4.0) * jax.nn.softplus(-0.1 * up + 0.07 * down)).mean()

    def both(params):
        by_passes = kernels.batch_rates(m.view, params, chosen, rejected, loss, chosen)
        sides = [log_probs(m.view, params, side) for side in (chosen, rejected)]
        rows = [
            jnp.concatenate(
                [g.reshape(3, -1) for g in jax.tree.leaves(jax.jacrev(lambda p, s=s: log_probs(m.view, p, s))(params))],
                1,
            )
            for s in (chosen, rejected)
        ]
        up, down = jax.grad(loss, argnums=(0, 1))(*sides)
        return by_passes, -(rows[0] @ rows[0].T) @ up - (rows[0] @ rows[1].T) @ down

    by_passes, by_kernel = jax.jit(both)(m.params)
    return Outcome(value=worst(jnp.abs(by_passes - by_kernel) / jnp.abs(by_kernel).max()), n=3)


@claim(
    "F6",
    "one step: predicted and measured change of ln pi(y+) agree, slope 1 +- 0.02, r > 0.99; SGD and a sign step",
    source="first order",
    status="statistical",
    scope="model",
    tolerance=0.02,
)
def one_step(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    velocities = {"SGD": m.velocity, "sign": jax.tree.map(jnp.sign, m.velocity)}
    rate = jax.jit(lambda p, probes, v: kernels.rates_along(m.view, p, probes, v))
    before, told = m.log_probs(m.params, m.chosen), {}
    for name, velocity in velocities.items():
        rates = np.asarray(rate(m.params, m.chosen, velocity))
        # a step that changes log-probabilities by about a thousandth of a nat
        step = 1e-3 / np.abs(rates).max()
        after = m.log_probs(jax.tree.map(lambda p, v, s=step: p + s * v, m.params, velocity), m.chosen)
        measured = np.asarray(after - before)
        told[name] = {
            "slope": float((step * rates) @ measured / ((step * rates) @ (step * rates))),
            "r": float(np.corrcoef(step * rates, measured)[0, 1]),
        }
    off = max(abs(t["slope"] - 1) for t in told.values())
    correlated = all(t["r"] > 0.99 for t in told.values())
    return Outcome(value=off if correlated else np.inf, n=len(before), detail=told)


@claim(
    "F2",
    "the head score ranks own-pair rates better than CHES does (Spearman, with CHES and baselines beside it)",
    source="Theorem 3; Definition 2; Section 5 of the paper",
    status="statistical",
    scope="model",
    tolerance=0.0,
)
def scores_against_rates(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    rng = np.random.default_rng(ctx.seed)
    table = {name: bootstrap_spearman(values, -m.own_rates, rng) for name, values in m.scores.items()}
    table["batch rate"] = bootstrap_spearman(-m.batch_rates, -m.own_rates, rng)
    value = table["ches"]["rho"] - table["head_score"]["rho"]
    displaced = {"own": float((m.own_rates < 0).mean()), "batch": float((m.batch_rates < 0).mean())}
    return Outcome(value=value, n=len(m.pairs), detail={"spearman": table, "share displaced at once": displaced})


@claim(
    "F3",
    "scores, and the true rate, against finite training of each pair alone (5 steps of RMSProp)",
    source="Section 5 of the paper; reported",
    status="statistical",
    scope="model",
    tolerance=1.0,
)
def scores_against_training(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    rng = np.random.default_rng(ctx.seed)
    change = m.train_alone(torch_rmsprop(1e-5), 5)
    table = {name: bootstrap_spearman(values, -change, rng) for name, values in m.scores.items()}
    table["own rate"] = bootstrap_spearman(-m.own_rates, -change, rng)
    detail = {"spearman": table, "share displaced": float((change < 0).mean()), "mean change": float(change.mean())}
    return Outcome(value=1 - max(t["rho"] for t in table.values()), n=len(change), detail=detail)


@claim(
    "F4",
    "|alpha| <= 2, and most inner products of hidden states positive (Appendix G.2: > 69% of alphas, > 99% of those)",
    source="Theorem 6; Appendix G.2",
    status="statistical",
    scope="model",
    tolerance=0.5,
)
def positivity(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    w = m.view.unembedding(m.params)

    def one(pair):
        errors, states = [], []
        for side in pair:
            states.append(m.view.hidden(m.params, jax.tree.map(lambda a: a[None], side))[0, :-1])
            errors.append(residual(m.view.transform(states[-1] @ w.T), side.tokens[1:]))
        alpha, products = errors[0] @ errors[1].T, states[0] @ states[1].T
        cross = pair[0].response[1:, None] & pair[1].response[None, 1:]
        largest = jnp.where(cross, jnp.abs(alpha), 0.0).max()
        share = [(cross & (x > 0)).sum() / cross.sum() for x in (alpha, products, alpha * products)]
        return jnp.stack([largest, *share])

    seen = np.asarray(jax.jit(lambda pairs: jax.lax.map(one, pairs))((m.chosen, m.rejected)))
    means = seen[:, 1:].mean(0)
    detail = {
        "largest |alpha|": float(seen[:, 0].max()),
        "alpha > 0": means[0],
        "<h,h'> > 0": means[1],
        "both": means[2],
    }
    in_range = seen[:, 0].max() <= 2 + 1e-12
    return Outcome(value=1 - float(means[1]) if in_range else np.inf, n=len(seen), detail=detail)


@claim(
    "F5",
    "which tokens gain at the first difference: <W_z, W_y+ - W_y-> against the true rates, own pair (reported)",
    source="Theorem 5; Table 13",
    status="statistical",
    scope="model",
    tolerance=1.0,
)
def tokens_that_gain(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    w = m.view.unembedding(m.params)

    def one(pair):
        alone = [jax.tree.map(lambda a: a[None], side) for side in pair]
        at = jnp.argmax(alone[0].tokens[0] != alone[1].tokens[0])

        def table(p):
            return jax.nn.log_softmax(m.view.transform(m.view.unembedding(p) @ m.view.hidden(p, alone[0])[0, at - 1]))

        own = kernels.direction(m.view, m.params, alone[0], alone[1], lambda u, d: (0.5 * BETA * (d - u)).sum())
        gains = jax.jvp(table, (m.params,), (own,))[1]
        difference = w[pair[0].tokens[at]] - w[pair[1].tokens[at]]
        along = w @ difference
        # the part of W_+ - W_- along W_+ against the part across it (Table 13)
        up = w[pair[0].tokens[at]]
        parallel = (difference @ up) / jnp.linalg.norm(up)
        across = jnp.sqrt(jnp.maximum(difference @ difference - parallel**2, 0.0))
        return gains, along, parallel, across

    gains, along, parallel, across = (
        np.asarray(a) for a in jax.jit(lambda pairs: jax.lax.map(one, pairs))(_first((m.chosen, m.rejected), FEW))
    )
    rho = [spearman(a, g) for a, g in zip(along, gains, strict=True)]
    top = [len(set(np.argsort(-a)[:10]) & set(np.argsort(-g)[:10])) / 10 for a, g in zip(along, gains, strict=True)]
    detail = {
        "spearman over the vocabulary": float(np.mean(rho)),
        "overlap of the top 10": float(np.mean(top)),
        "along W_+ shorter than across it": float((np.abs(parallel) < across).mean()),
    }
    return Outcome(value=1 - float(np.mean(rho)), n=len(rho), detail=detail)


@claim(
    "F7",
    "shares of K++ by module: the unembedding's says what a head score can see (reported)",
    source="derived",
    status="statistical",
    scope="model",
    tolerance=1.0,
)
def kernel_shares(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    total, _, _ = m.grams.total()
    shares = {name: float((values / total).mean()) for name, values in m.grams.chosen.items()}
    return Outcome(value=1 - sum(shares.values()) + 1e-15, n=len(total), detail=shares)


@claim(
    "D1m",
    "on the model: displaced by its own pair => |grad ln pi(y-)| > |grad ln pi(y+)|, and never inverted",
    source="derived (K is positive semidefinite)",
    status="bound",
    scope="model",
    tolerance=0.0,
)
def displaced_on_the_model(ctx: Context) -> Outcome:
    up, cross, down = (np.asarray(k) for k in ctx.model.grams.total())
    broken = ((cross > up) & (down <= up)) | ((cross > up) & (cross > down))
    return Outcome(value=float(broken.sum()), n=len(up), detail={"share displaced": float((cross > up).mean())})


def group_rates(m: RealModel) -> dict[str, Array]:
    """Own-pair rates through each module alone: what training only it would do."""
    return {g: (m.grams.chosen[g] - m.grams.cross[g]) * BETA / 2 for g in m.grams.chosen}


@claim(
    "F8",
    "head score against the rate through the body alone, the unembedding frozen (reported)",
    source="derived: LoRA on attention and MLP leaves no gradient in W",
    status="statistical",
    scope="model",
    tolerance=1.0,
)
def frozen_head(ctx: Context) -> Outcome:
    m: RealModel = ctx.model
    parts = group_rates(m)
    body = -np.asarray(sum(v for g, v in parts.items() if g not in ("head", "embed")))
    rng = np.random.default_rng(ctx.seed)
    table = {name: bootstrap_spearman(values, body, rng) for name, values in m.scores.items()}
    return Outcome(value=1 - table["head_score"]["rho"], n=len(body), detail={"spearman": table})
