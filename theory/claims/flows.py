"""Claims about whole trajectories: signs along the flow, conserved quantities, discretisation, the regimes."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from theory import instances, theorems
from theory.claims.identities import relative, truth
from theory.claims.registry import Context, Outcome, claim, sweep, worst
from theory.constructions import BETA, DURATION, TOKENS, Construction, constructions, dpo_of
from theory.dynamics import (
    classify,
    cumulative_prediction,
    gradient_flow,
    invariants,
    mass_by_label,
    optimise,
    step_change,
    token_probabilities,
    torch_rmsprop,
)
from theory.instances import Draw, PairInstance
from theory.objectives import MARGIN_LOSSES, dpo, dpop, mean_of
from theory.ufm import UFM, Responses, log_probs, pair_log_probs, rescale

FLOWS = [{"vocabulary": 5, "width": 3, "length": 3}]
OPTIMISERS = {
    "SGD": optax.sgd(0.1),
    "Adam": optax.adam(0.01),
    "RMSProp": torch_rmsprop(0.001),
}


def _loss(i: PairInstance) -> Callable[[UFM], Array]:
    return lambda model: mean_of(i.loss.ell)(*pair_log_probs(model, i.pairs))


@claim(
    "L1",
    "Lemma 1: DPO's slope is negative at every margin",
    source="Lemma 1",
    status="bound",
    tolerance=-1e-300,
)
def dpo_slope(ctx: Context) -> Outcome:
    def check(draw):
        u, ref, beta = 200 * draw.normal(()), 20 * draw.normal(()), draw.uniform((), 0.01, 1.0)
        return jax.grad(dpo)(u, ref, beta)

    slopes = sweep(ctx.key("L1"), 10 * ctx.instances, check, [{}])
    return Outcome(value=worst(slopes), n=len(slopes))


@lru_cache(maxsize=4)
def _flow(seed: int) -> dict[str, Any]:
    """Random flows of one pair: slopes and conserved quantities over time."""

    def check(draw: Draw, **size):
        i = instances.random_pair(draw, **size)
        lipschitz = jnp.array([n for n, loss in enumerate(MARGIN_LOSSES) if loss.lipschitz_slope], jnp.int32)
        # a loss with a Lipschitz slope, that decreases at the start
        which = lipschitz[draw.integers((), 0, lipschitz.shape[0])]
        start = jnp.subtract(*pair_log_probs(i.model, i.pairs))[0]
        i = i._replace(loss=i.loss._replace(which=which, ref=start))
        models = gradient_flow(_loss(i), i.model, jnp.linspace(0.0, 5.0, 21))

        def at(model):
            u = jnp.subtract(*pair_log_probs(model, i.pairs))[0]
            kept = invariants(model)
            return i.loss.slope(u), u, kept.balance, kept.mean_unembedding

        slopes, margins, balance, mean = jax.vmap(at)(models)
        discrete = optimise(_loss(i), i.model, optax.sgd(0.1), 30)
        return {
            "slope": (slopes / jnp.abs(slopes[0])).max(),
            "margin": -jnp.diff(margins).min(),
            "balance": jnp.abs(balance - balance[:1]).max() / (1 + jnp.abs(balance).max()),
            "mean": jnp.abs(mean - mean[:1]).max(),
            "mean, discrete": jnp.abs(jax.vmap(lambda m: m.sum(0))(discrete.unembedding) - mean[:1]).max(),
        }

    return sweep(Context(seed=seed).key("flow"), 48, check, FLOWS)


def _of_flow(ctx: Context, *names: str) -> Outcome:
    seen = _flow(ctx.seed)
    parts = {name: worst(seen[name]) for name in names}
    return Outcome(value=max(parts.values()), n=len(seen["slope"]), detail=parts)


@claim(
    "L2",
    "Lemma 2 for losses with a Lipschitz slope: l' < 0 along the flow, and the margin never falls",
    source="Lemma 2, with its unprinted assumption",
    status="bound",
    tolerance=1e-7,  # the integrator's error, with the margin in nats
)
def slope_along_the_flow(ctx: Context) -> Outcome:
    return _of_flow(ctx, "slope", "margin")


@claim(
    "I1",
    "W^T W - sum_c h_c h_c^T is conserved by gradient flow",
    source="derived",
    status="exact",
    tolerance=1e-8,
)
def balance(ctx: Context) -> Outcome:
    return _of_flow(ctx, "balance")


@claim(
    "I2",
    "sum_z W_z is conserved by gradient flow and by gradient descent",
    source="derived",
    status="exact",
    tolerance=1e-12,
)
def mean_unembedding(ctx: Context) -> Outcome:
    return _of_flow(ctx, "mean", "mean, discrete")


@claim(
    "G1",
    "gradient descent follows the flow with an error proportional to the step",
    source="standard; measured slope in log-log",
    status="statistical",
    tolerance=0.1,
)
def descent_to_flow(ctx: Context) -> Outcome:
    rates = (0.1, 0.05, 0.025)

    def check(draw, **size):
        i = instances.random_pair(draw, **size)
        i = i._replace(loss=i.loss._replace(which=jnp.int32(0)))
        loss = _loss(i)
        end = jax.tree.map(lambda a: a[-1], gradient_flow(loss, i.model, jnp.array([0.0, 2.0])))
        errors = []
        for rate in rates:
            last = jax.tree.map(lambda a: a[-1], optimise(loss, i.model, optax.sgd(rate), round(2 / rate)))
            errors.append(jnp.abs(log_probs(last, i.pairs.chosen) - log_probs(end, i.pairs.chosen))[0])
        return jnp.stack(errors)

    errors = sweep(ctx.key("G1"), 32, check, FLOWS)
    slopes = np.log2(errors[:, :-1] / errors[:, 1:])
    slope = float(np.median(slopes))
    return Outcome(value=abs(slope - 1), n=len(errors), detail={"slope": slope})


@claim(
    "G2",
    "the sum of <grad ln pi, update> along a run is the change of ln pi (Simpson), for SGD, Adam and RMSProp",
    source="derived",
    status="exact",
    tolerance=1e-3,
)
def accumulated_prediction(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_batch(draw, **size)
        start = jnp.subtract(*pair_log_probs(i.model, i.pairs)).mean()
        i = i._replace(loss=i.loss._replace(which=jnp.int32(0), ref=start))

        def of(model):
            return log_probs(model, i.pairs.chosen)

        errors = {}
        for name, optimiser in OPTIMISERS.items():
            models = optimise(_loss(i), i.model, optimiser, 60)
            measured = jax.vmap(of)(models) - of(i.model)[None]
            predicted = cumulative_prediction(of, models)
            errors[name] = relative(predicted, measured, jnp.abs(measured).max())
        return errors

    seen = sweep(ctx.key("G2"), 24, check, [FLOWS[0] | {"pairs": 4}])
    parts = {name: worst(values) for name, values in seen.items()}
    return Outcome(value=max(parts.values()), n=24, detail=parts)


@claim(
    "G3",
    "one step to second order leaves a remainder of third order in the step",
    source="Taylor",
    status="statistical",
    tolerance=0.1,
)
def second_order(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_pair(draw, **size)
        i = i._replace(loss=i.loss._replace(which=jnp.int32(0)))
        gradient = jax.grad(_loss(i))(i.model)

        def of(model):
            return log_probs(model, i.pairs.chosen)

        def remainder(eta):
            update = jax.tree.map(lambda g: -eta * g, gradient)
            after = jax.tree.map(jnp.add, i.model, update)
            return jnp.abs(of(after) - of(i.model) - step_change(of, i.model, update, order=2))[0]

        return jnp.log2(remainder(2e-2) / remainder(1e-2))

    slopes = sweep(ctx.key("G3"), min(200, ctx.instances), check, FLOWS)
    order = float(np.median(slopes))
    return Outcome(value=abs(order - 3), n=len(slopes), detail={"order": order})


@lru_cache(maxsize=1)
def regime_runs() -> dict[str, dict[str, Any]]:
    """Every construction, trained by gradient flow with DPO: curves and verdicts. In the caller's precision."""
    return {c.name: run_construction(c) for c in constructions()}


def run_construction(c: Construction, *, linear: bool = False) -> dict[str, Any]:
    """One construction's whole trajectory and what became of it; ``linear`` freezes the features."""
    loss = dpo_of(c)
    times = jnp.linspace(0.0, DURATION, 121)
    frozen = UFM(True, False) if linear else None  # type: ignore[arg-type]
    models = jax.jit(lambda m: gradient_flow(loss, m, times, trainable=frozen))(c.model)
    probabilities = jax.vmap(token_probabilities)(models)
    losses = np.asarray(jax.vmap(loss)(models))
    masses = mass_by_label(probabilities, c.labels)
    gains = {name: float(mass[-1] - mass[0]) for name, mass in masses.items() if name != "chosen"}
    chosen, rejected = TOKENS.index(c.chosen), TOKENS.index(c.rejected)
    log_prob = np.log(np.asarray(probabilities))
    w, h = c.model
    slope = jnp.asarray(-BETA / 2)
    direction = np.array(theorems.theorem_5(w, h[0], jnp.int32(chosen), jnp.int32(rejected), slope).total)
    direction[[chosen, rejected]] = -np.inf
    return {
        "times": np.asarray(times),
        "losses": losses,
        "log_probs": log_prob,
        "masses": {name: np.asarray(mass) for name, mass in masses.items()},
        "rate_at_start": float(theorems.theorem_4(w, h[0], jnp.int32(chosen), jnp.int32(rejected), slope).total),
        "change": float(log_prob[-1, chosen] - log_prob[0, chosen]),
        "verdict": classify(
            log_prob[-1, chosen] - log_prob[0, chosen], losses[-1] - losses[0], gains, "same", "opposite"
        ),
        "winner": TOKENS[int((probabilities[-1] - probabilities[0]).argmax())],
        "first_by_theorem_5": TOKENS[int(direction.argmax())],
        "loss_rises": float(np.diff(losses).max()),
    }


def _told(run: dict[str, Any]) -> dict[str, Any]:
    return {k: run[k] for k in ("verdict", "winner", "first_by_theorem_5", "rate_at_start", "change")}


@claim(
    "R1",
    "the three regimes: none, benign (Yes>No) and catastrophic (No>Never, Sure>Yes), the mass where Theorem 5 says",
    source="Theorem 5; Section 1 of the paper; constructions are the project's own",
    status="exact",
    tolerance=0.0,
)
def regimes(ctx: Context) -> Outcome:
    wrong, told = 0, {}
    for c in constructions():
        run = regime_runs()[c.name]
        told[c.name] = _told(run)
        wrong += run["verdict"] != c.verdict
        wrong += run["winner"] != c.winner
        wrong += run["verdict"] != "none" and run["first_by_theorem_5"] != c.winner
        wrong += run["loss_rises"] > 1e-10
    return Outcome(value=float(wrong), n=len(told), detail=told)


@claim(
    "R2",
    "the rate at t = 0 tells whether a run ends in displacement",
    source="a common reading of Theorem 4",
    status="refuted as printed",
    tolerance=1.0,
)
def first_rate_tells_the_end(ctx: Context) -> Outcome:
    told = {name: _told(run) for name, run in regime_runs().items()}
    wrong = [name for name, run in told.items() if run["rate_at_start"] * run["change"] < 0]
    return Outcome(value=float(len(wrong)), n=len(told), detail={"wrong": {n: told[n] for n in wrong}})


@claim(
    "R3",
    "linear model (features frozen): a pair of single tokens on one prompt is never displaced",
    source="Theorem 4 without its unembedding terms; derived",
    status="exact",
    tolerance=0.0,
)
def linear_models(ctx: Context) -> Outcome:
    told = {c.name: _told(run_construction(c, linear=True)) for c in constructions() if c.verdict != "none"}
    return Outcome(value=float(sum(run["verdict"] != "none" for run in told.values())), n=len(told), detail=told)


def _catastrophe() -> Construction:
    return next(c for c in constructions() if c.name == "no_never")


@claim(
    "R4",
    "at an equal fall of the loss, GD, RMSProp, Adam and sign descent have the same winner (not the same change of y+)",
    source="measured; one construction",
    status="exact",
    tolerance=0.0,
)
def optimisers_share_the_winner(ctx: Context) -> Outcome:
    c = _catastrophe()
    loss = dpo_of(c)
    choices = {
        "GD": (optax.sgd(0.01), 400),
        "RMSProp": (torch_rmsprop(0.005), 400),
        "Adam": (optax.adam(0.01), 400),
        "sign": (optax.sign_sgd(0.005), 400),
    }
    told = {}
    for name, (optimiser, steps) in choices.items():
        models = jax.jit(lambda m, o=optimiser, n=steps: optimise(loss, m, o, n))(c.model)
        losses = np.asarray(jax.vmap(loss)(models))
        at = int(np.argmax(losses <= losses[0] - 0.1))
        p = np.asarray(jax.vmap(token_probabilities)(models))
        chosen = TOKENS.index(c.chosen)
        told[name] = {
            "change": float(np.log(p[at, chosen] / p[0, chosen])),
            "winner": TOKENS[int((p[at] - p[0]).argmax())],
            "change at the end of the run": float(np.log(p[-1, chosen] / p[0, chosen])),
            "steps": at,
        }
    good = {n for n, t in told.items() if t["steps"] > 0 and t["winner"] == told["GD"]["winner"]}
    return Outcome(value=float(len(told) - len(good)), n=len(told), detail=told)


@claim(
    "R5",
    "DPOP holds y+ at its reference once lambda passes K+-/K++ - 1, and not before",
    source="arXiv 2402.13228; threshold derived",
    status="exact",
    tolerance=0.0,
)
def dpop_pins(ctx: Context) -> Outcome:
    c = _catastrophe()
    start = pair_log_probs(c.model, c.pairs)
    i = PairInstance(c.model, c.pairs, c.pairs.chosen, instances.LossDraw(jnp.int32(0), jnp.zeros(()), jnp.ones(())))

    def change(strength: float) -> float:
        objective = dpop(start[0], start[1], BETA, strength)

        def loss(model):
            return objective(*pair_log_probs(model, c.pairs))

        models = jax.jit(lambda m: optimise(loss, m, optax.sgd(0.002), 3000))(c.model)
        return float(jax.vmap(lambda m: log_probs(m, i.pairs.chosen)[0])(models)[-1] - start[0][0])

    changes = {f"lambda {s:g}": change(s) for s in (0.0, 50.0)}
    wrong = int(changes["lambda 0"] > -1) + int(changes["lambda 50"] < -0.1)
    return Outcome(value=float(wrong), n=2, detail=changes)


@claim(
    "R6",
    "W -> s W, h -> h / s leaves every probability and moves the rate as s^2 A + B / s^2",
    source="derived",
    status="exact",
    tolerance=1e-10,
)
def rescaling(ctx: Context) -> Outcome:
    def check(draw, vocabulary, width):
        i = instances.random_single_token(draw, vocabulary=vocabulary, width=width)

        def rate(s):
            return truth(i._replace(model=rescale(i.model, s)), Responses(*i.pairs.chosen))[0]

        # two scales fix A and B; a third tests them
        first, second, third = rate(1.0), rate(2.0), rate(3.0)
        b = (4 * first - second) / (4 - 0.25)
        a = first - b
        return jnp.abs(9 * a + b / 9 - third) / (9 * jnp.abs(a) + jnp.abs(b) + jnp.abs(third) + 1e-300)

    errors = sweep(ctx.key("R6"), ctx.instances, check, [{"vocabulary": 6, "width": 4}])
    return Outcome(value=worst(errors), n=len(errors))
