"""Claims about whole trajectories: signs along the flow, conserved quantities, discretisation, the regimes."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from theory.claims.bounds import outcome, starts
from theory.claims.identities import margin, relative, truth
from theory.claims.registry import Context, Outcome, bound, exact, refuted, share, statistical, sweep, swept, worst
from theory.statements import entanglement, theorems
from theory.statements.entanglement import PairKernel
from theory.statements.objectives import MARGIN_LOSSES, dpop, mean_of
from theory.toy import instances
from theory.toy.constructions import (
    BETA,
    TOKENS,
    Construction,
    Run,
    constructions,
    dpo_of,
    flows,
    linear_model,
)
from theory.toy.dynamics import (
    cumulative_prediction,
    gradient_flow,
    invariants,
    optimise,
    sign_descent,
    step_change,
    token_probabilities,
    torch_rmsprop,
)
from theory.toy.instances import Draw, PairInstance
from theory.toy.search import ascend, run_once
from theory.toy.ufm import UFM, Pairs, Responses, descent, gram, log_probs, pair_log_probs, rescale

FLOWS = {"vocabulary": 5, "width": 3, "length": 3}
RUNS = 48
"""Random trajectories of a claim: each is hundreds of steps."""
OPTIMISERS = {
    "SGD": optax.sgd(0.1),
    "Adam": optax.adam(0.01),
    "RMSProp": torch_rmsprop(0.001),
}


def _loss(i: PairInstance) -> Callable[[UFM], Array]:
    return lambda model: mean_of(i.loss.ell)(*pair_log_probs(model, i.pairs))


def _with_dpo(i: PairInstance, ref: Array) -> PairInstance:
    return i._replace(loss=i.loss._replace(which=jnp.int32(0), ref=ref))


@bound("L1", "Lemma 1: DPO's slope is negative at every margin", "Lemma 1", -1e-300)
def dpo_slope(ctx: Context) -> Outcome:
    def check(draw):
        u, ref, beta = 100 * draw.normal(()), 20 * draw.normal(()), draw.uniform((), 0.01, 1.0)
        return {"slope": theorems.lemma_1(u, ref, beta)}

    def attack(x):
        return {"slope": theorems.lemma_1(10 * x[0], 10 * x[1], jnp.exp(x[2]))}

    return outcome(sweep(ctx.key(), 10 * ctx.instances, check), ascend(attack, starts(ctx, 3)))


@lru_cache(maxsize=4)
def _flow(seed: int) -> dict[str, Any]:
    """Random flows of one pair: slopes and conserved quantities over time."""
    lipschitz = np.array([n for n, loss in enumerate(MARGIN_LOSSES) if loss.lipschitz_slope], np.int32)
    times = jnp.linspace(0.0, 5.0, 401)

    def check(draw: Draw, **size):
        i = instances.random_pair(draw, **size)
        # a loss with a Lipschitz slope, that decreases at the start
        which = jnp.asarray(lipschitz)[draw.integers((), 0, len(lipschitz))]
        i = i._replace(loss=i.loss._replace(which=which, ref=margin(i)))
        models = gradient_flow(_loss(i), i.model, times)

        def at(model):
            u, k, kept = margin(i._replace(model=model)), gram(model, *i.pairs), invariants(model)
            slope, curvature = jax.value_and_grad(i.loss.slope)(u)
            return slope, curvature, u, k[0, 0] - 2 * k[0, 1] + k[1, 1], kept.balance, kept.mean_unembedding

        slopes, curvatures, margins, pulls, balance, mean = jax.vmap(at)(models)
        least = theorems.lemma_2(slopes[0], curvatures.max(), times, pulls)
        discrete = optimise(_loss(i), i.model, optax.sgd(0.1), 30)
        return {
            "slope below its bound": ((least + slopes[::2]) / -slopes[0]).max(),
            "margin falls": -jnp.diff(margins).min(),
            "balance": jnp.abs(balance - balance[:1]).max() / (1 + jnp.abs(balance).max()),
            "mean": jnp.abs(mean - mean[:1]).max(),
            "mean, discrete": jnp.abs(jax.vmap(lambda m: m.sum(0))(discrete.unembedding) - mean[:1]).max(),
        }

    return sweep(Context(seed=seed).key("flow"), RUNS, check, [FLOWS])


def _of_flow(ctx: Context, *names: str) -> Outcome:
    seen = _flow(ctx.seed)
    parts = {name: worst(seen[name]) for name in names}
    return Outcome(value=max(parts.values()), n=RUNS, detail=parts)


@bound(
    "L2",
    "Lemma 2 for Lipschitz slopes: along the flow -l' > 0 by Groenwall's bound, and the margin never falls",
    "Lemma 2, with its unprinted assumption; bound derived",
    1e-6,  # Simpson's rule on 400 intervals; the slope in units of the first one
)
def slope_along_the_flow(ctx: Context) -> Outcome:
    return _of_flow(ctx, "slope below its bound", "margin falls")


@exact("I1", "W^T W - sum_c h_c h_c^T is conserved by gradient flow", "derived", 1e-8)
def balance(ctx: Context) -> Outcome:
    return _of_flow(ctx, "balance")


@exact("I2", "sum_z W_z is conserved by gradient flow and by gradient descent", "derived", 1e-12)
def mean_unembedding(ctx: Context) -> Outcome:
    return _of_flow(ctx, "mean", "mean, discrete")


@statistical(
    "G1",
    "gradient descent follows the flow with an error proportional to the step",
    "standard; measured slope in log-log",
    0.1,
)
def descent_to_flow(ctx: Context) -> Outcome:
    rates, end = np.array([0.1, 0.05, 0.025]), 2.0
    steps = np.round(end / rates).astype(int)

    def check(draw, **size):
        i = instances.random_pair(draw, **size)
        loss = _loss(_with_dpo(i, i.loss.ref))

        def at_end(rate, count):
            path = optimise(loss, i.model, optax.sgd(rate), int(steps.max()))
            return log_probs(jax.tree.map(lambda a: a[count], path), i.pairs.chosen)[0]

        flow = jax.tree.map(lambda a: a[-1], gradient_flow(loss, i.model, jnp.array([0.0, end])))
        return jnp.abs(jax.vmap(at_end)(jnp.asarray(rates), jnp.asarray(steps)) - log_probs(flow, i.pairs.chosen)[0])

    errors = sweep(ctx.key(), RUNS, check, [FLOWS])
    slope = float(np.median(np.log2(errors[:, :-1] / errors[:, 1:])))
    figure = {"steps": rates, "errors": np.median(errors, axis=0)}
    return Outcome(value=abs(slope - 1), n=RUNS, detail={"slope": slope}, figure=figure)


@exact(
    "G2",
    "the sum of <grad ln pi, update> along a run is the change of ln pi (Simpson), for SGD, Adam and RMSProp",
    "derived",
    1e-3,
)
def accumulated_prediction(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_batch(draw, **size)
        i = _with_dpo(i, jnp.subtract(*pair_log_probs(i.model, i.pairs)).mean())

        def of(model):
            return log_probs(model, i.pairs.chosen)

        errors = {}
        for name, optimiser in OPTIMISERS.items():
            models = optimise(_loss(i), i.model, optimiser, 60)
            measured = jax.vmap(of)(models) - of(i.model)[None]
            errors[name] = relative(cumulative_prediction(of, models), measured, jnp.abs(measured).max())
        return errors

    seen = sweep(ctx.key(), RUNS, check, [FLOWS | {"pairs": 4}])
    parts = {name: worst(values) for name, values in seen.items()}
    return Outcome(value=max(parts.values()), n=RUNS, detail=parts)


@statistical("G3", "one step to second order leaves a remainder of third order in the step", "Taylor", 0.1)
def second_order(ctx: Context) -> Outcome:
    etas = np.geomspace(0.32, 0.01, 6)

    def check(draw, **size):
        i = instances.random_pair(draw, **size)
        gradient = jax.grad(_loss(_with_dpo(i, i.loss.ref)))(i.model)

        def of(model):
            return log_probs(model, i.pairs.chosen)[0]

        def remainders(eta):
            update = jax.tree.map(lambda g: -eta * g, gradient)
            change = of(jax.tree.map(jnp.add, i.model, update)) - of(i.model)
            return jnp.abs(jnp.stack([change - step_change(of, i.model, update, order=n) for n in (1, 2)]))

        return jax.vmap(remainders)(jnp.asarray(etas))

    left = sweep(ctx.key(), min(200, ctx.instances), check, [FLOWS])
    orders = np.median(np.log2(left[:, -2] / left[:, -1]), axis=0)
    detail = {"order of what the first order leaves": float(orders[0]), "second order": float(orders[1])}
    figure = {"steps": etas, "first": np.median(left[:, :, 0], axis=0), "second": np.median(left[:, :, 1], axis=0)}
    return Outcome(value=float(np.abs(orders - [2, 3]).max()), n=len(left), detail=detail, figure=figure)


@lru_cache(maxsize=1)
def regime_runs() -> dict[str, Run]:
    """Every construction, and each with its features frozen, trained by gradient flow with DPO."""
    return flows([*constructions(), *map(linear_model, constructions())])


def _run_detail(run: Run) -> dict[str, Any]:
    words = {"verdict": run.kind, "winner": run.winner, "first_by_theorem_5": run.first_by_theorem_5}
    return words | {"rate_at_start": run.rate, "change": run.change}


def _run_figure(c: Construction, run: Run) -> dict[str, Any]:
    """What the figures show of a run."""
    pair = [TOKENS.index(c.chosen), TOKENS.index(c.rejected)]
    k = jnp.asarray(run.kernels)
    band = entanglement.disentanglement_band(PairKernel(k[:, 0, 0], k[:, 0, 1], k[:, 1, 1]))
    return {
        "chosen": c.chosen,
        "rejected": c.rejected,
        "scale": c.scale,
        "verdict": run.kind,
        "times": run.times,
        "log_probs": run.log_probs[:, pair],
        "rate": run.rate,
        "masses": run.masses,
        "terms": run.terms,
        "tokens": TOKENS,
        "direction": run.direction,
        "gains": run.log_probs[-1] - run.log_probs[0],
        "band": [np.asarray(end) for end in band],
    }


@exact(
    "R1",
    "the three regimes: none, benign (Yes>No) and catastrophic (No>Never, Sure>Yes), the mass where Theorem 5 says",
    "Theorem 5; Section 1 of the paper; constructions are the project's own",
    0.0,
)
def regimes(ctx: Context) -> Outcome:
    wrong, runs = 0, {c.name: regime_runs()[c.name] for c in constructions()}
    for c in constructions():
        run = runs[c.name]
        wrong += run.kind != c.kind
        wrong += run.winner != c.winner
        wrong += run.kind != "none" and run.first_by_theorem_5 != c.winner
        wrong += bool(np.diff(run.losses).max() > 1e-10)
    return Outcome(
        value=float(wrong),
        n=len(runs),
        detail={name: _run_detail(run) for name, run in runs.items()},
        figure={c.name: _run_figure(c, runs[c.name]) for c in constructions()},
    )


@refuted("R2", "the rate at t = 0 tells whether a run ends in displacement", "a common reading of Theorem 4", 1.0)
def first_rate_tells_the_end(ctx: Context) -> Outcome:
    runs = {c.name: regime_runs()[c.name] for c in constructions()}
    wrong = {name: _run_detail(run) for name, run in runs.items() if run.rate * run.change < 0}
    return Outcome(value=float(len(wrong)), n=len(constructions()), detail={"wrong": wrong})


def _catastrophe() -> Construction:
    return next(c for c in constructions() if c.name == "no_never")


@lru_cache(maxsize=1)
def optimiser_runs() -> dict[str, dict[str, np.ndarray]]:
    """The catastrophic construction under several optimisers, with free and with frozen features (in this order)."""
    c = _catastrophe()
    loss = dpo_of(c)
    choices = {
        "GD": optax.sgd(0.01),
        "RMSProp": torch_rmsprop(0.005),
        "Adam": optax.adam(0.01),
        "sign": sign_descent(0.005),
    }

    def run(moves, optimiser):
        path = optimise(loss, c.model, optimiser, 400, trainable=UFM(True, moves))  # type: ignore[arg-type]
        return {"losses": jax.vmap(loss)(path), "probabilities": jax.vmap(token_probabilities)(path)}

    def all_of_them(moves):
        return {name: run(moves, optimiser) for name, optimiser in choices.items()}

    return jax.device_get(run_once(jax.vmap(all_of_them), jnp.array([True, False])))


@exact(
    "R3",
    "linear model (features frozen): a pair of single tokens on one prompt is never displaced, by flow or optimiser",
    "Theorem 4 without its unembedding terms; derived",
    0.0,
)
def linear_models(ctx: Context) -> Outcome:
    chosen = TOKENS.index(_catastrophe().chosen)
    detail: dict[str, Any] = {name: run.change for name, run in regime_runs().items() if name.endswith("_linear")}
    for name, run in optimiser_runs().items():
        detail[f"no_never, {name}"] = float(
            np.log(run["probabilities"][1, -1, chosen] / run["probabilities"][1, 0, chosen])
        )
    return Outcome(value=float(sum(change < 0 for change in detail.values())), n=len(detail), detail=detail)


@exact(
    "R4",
    "at an equal fall of the loss, GD, RMSProp, Adam and sign descent have the same winner (not the same change of y+)",
    "measured; one construction",
    0.0,
)
def optimisers_share_the_winner(ctx: Context) -> Outcome:
    c = _catastrophe()
    pair = [TOKENS.index(c.chosen), TOKENS.index(c.rejected)]
    detail = {}
    for name, runs in optimiser_runs().items():
        losses, p = runs["losses"][0], runs["probabilities"][0]
        at = int(np.argmax(losses <= losses[0] - 0.1))
        detail[name] = {
            "change": float(np.log(p[at, pair[0]] / p[0, pair[0]])),
            "winner": TOKENS[int((p[at] - p[0]).argmax())],
            "change at the end of the run": float(np.log(p[-1, pair[0]] / p[0, pair[0]])),
            "steps": at,
        }
    good = {n for n, t in detail.items() if t["steps"] > 0 and t["winner"] == detail["GD"]["winner"]}
    figure = {name: np.log(runs["probabilities"][0][:, pair]) for name, runs in optimiser_runs().items()}
    return Outcome(value=float(len(detail) - len(good)), n=len(detail), detail=detail, figure=figure)


@exact(
    "R5",
    "DPOP: y+ keeps falling from its reference iff lambda < K+-/K++ - 1; a large lambda holds it there to the end",
    "arXiv 2402.13228; threshold derived",
    0.0,
)
def dpop_pins(ctx: Context) -> Outcome:
    c = _catastrophe()
    start = pair_log_probs(c.model, c.pairs)
    k = gram(c.model, *c.pairs)
    threshold = float(k[0, 1] / k[0, 0] - 1)
    rate, early = 0.002, 20
    strengths = {"0": 0.0, "0.9 of the threshold": 0.9 * threshold, "1.1 of it": 1.1 * threshold, "50": 50.0}

    def changes(strength):
        objective = dpop(start[0], start[1], BETA, strength)
        path = optimise(lambda m: objective(*pair_log_probs(m, c.pairs)), c.model, optax.sgd(rate), 3000)
        return jax.vmap(lambda m: log_probs(m, c.pairs.chosen)[0])(path) - start[0][0]

    paths = np.asarray(run_once(jax.vmap(changes), jnp.array(list(strengths.values()))))
    # a step without the penalty, which the first one is
    step = float(rate * BETA / 2 * (k[0, 1] - k[0, 0]))
    penalised = {
        name: {f"after {early} steps": float(path[early]), "at the end": float(path[-1])}
        for name, path in zip(strengths, paths, strict=True)
    }
    wrong = int(paths[1, early] > -1.5 * step) + int(paths[2, early] < -step) + int(paths[3].min() < -2 * step)
    wrong += int(paths[0, -1] > -1)
    detail = penalised | {"threshold": threshold, "one step without the penalty": -step}
    return Outcome(value=float(wrong), n=len(penalised), detail=detail)


@exact("R6", "W -> s W, h -> h / s leaves every probability and moves the rate as s^2 A + B / s^2", "derived")
@swept({"vocabulary": 6, "width": 4})
def rescaling(draw: Draw, **size: int) -> Array:
    i = instances.random_single_token(draw, **size)

    def rate(s):
        return truth(i._replace(model=rescale(i.model, s)), i.pairs.chosen)[0]

    # two scales fix A and B; a third tests them
    first, second, third = jax.vmap(rate)(jnp.array([1.0, 2.0, 3.0]))
    b = (4 * first - second) / (4 - 0.25)
    a = first - b
    return jnp.abs(9 * a + b / 9 - third) / (9 * jnp.abs(a) + jnp.abs(b) + jnp.abs(third) + 1e-300)


@refuted(
    "R7",
    "linear model: samples that do not contradict a pair (other tokens, another prompt) cannot displace it",
    "a hasty reading of Theorem 8",
    0.05,
)
@swept({"vocabulary": 6, "width": 3}, outcome_of=share)
def other_samples_displace(draw: Draw, **size: int) -> Array:
    i = instances.random_single_token(draw, prompts=2, **size)
    first, aligned = i.model.features[0], 3 * i.model.features[0]
    model = i.model._replace(features=jnp.stack([first, aligned]))
    own = jnp.stack([side.tokens[0, 0] for side in i.pairs])
    # the second pair prefers the most probable of the other tokens to the least probable one
    pi = jax.nn.softmax(model.unembedding @ first)
    other = ~jnp.isin(jnp.arange(len(pi), dtype=jnp.int32), own)
    tokens = jnp.argmax(jnp.where(other, pi, -1.0)), jnp.argmin(jnp.where(other, pi, 2.0))
    contexts = jnp.arange(2, dtype=jnp.int32)[:, None]
    sides = [
        Responses(jnp.stack([y, z.astype(jnp.int32)])[:, None], contexts, jnp.ones((2, 1), bool))
        for y, z in zip(own, tokens, strict=True)
    ]
    pairs = Pairs(*sides)
    # both losses at their reference
    start = jnp.subtract(*pair_log_probs(model, pairs))
    velocity = descent(model, pairs, lambda up, down: jax.nn.softplus(-(up - down - start)).mean())
    frozen = velocity._replace(features=jnp.zeros_like(velocity.features))
    return jax.jvp(lambda m: log_probs(m, pairs.chosen)[0], (model,), (frozen,))[1] < 0
