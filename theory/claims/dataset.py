"""Claims about a data set as a whole: three inner products, pairs that the policy itself wrote, groups of responses."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory.claims.identities import BATCH, Errors, relative
from theory.claims.registry import Context, Outcome, exact, exceptions, largest, shared_sweeps
from theory.statements import dataset
from theory.statements.objectives import mean_of
from theory.toy import instances
from theory.toy.instances import Draw
from theory.toy.ufm import UFM, Responses, flow_rates, gram, log_probs, pair_log_probs, rates_by_autodiff

CLEAR = 1e-9
"""Share of the largest change by which the chosen must have moved, so that rounding does not decide its direction."""
OUTCOMES = [{"vocabulary": 4, "width": 3}, {"vocabulary": 6, "width": 5}]


def _products(draw: Draw, **size: int) -> Errors:
    """Against autodiff of the whole loss, at the reference and away from it."""
    i = instances.random_batch(draw, **size)
    beta = draw.uniform((), 0.05, 0.5)
    now = pair_log_probs(i.model, i.pairs)
    reference = jax.lax.stop_gradient(now[0] - now[1])

    def dpo(chosen: Array, rejected: Array) -> Array:
        return jax.nn.softplus(-beta * (chosen - rejected - reference)).mean()

    def gradient(responses: Responses, weights: Array) -> UFM:
        return jax.grad(lambda m: weights @ log_probs(m, responses))(i.model)

    even = jnp.full_like(now[0], 1 / len(now[0]))
    probe, chosen, rejected = (gradient(side, even) for side in (i.probe, *i.pairs))
    general = mean_of(i.loss.ell)
    up, down = (-g for g in jax.grad(general, argnums=(0, 1))(*now))
    parts = gradient(i.pairs.chosen, up), gradient(i.pairs.rejected, down)
    at_reference, elsewhere = flow_rates(i.model, i.pairs, [dpo, general], i.probe).mean(1)
    own = flow_rates(i.model, i.pairs, [dpo], i.pairs.chosen).mean()
    size_of = jnp.stack([dataset.inner(g, g) for g in (probe, chosen, rejected)]).max()
    slope = jnp.abs(jnp.stack([up, down])).max() * len(even)
    return {
        "I3": relative(dataset.dpo_mean_rate(probe, chosen, rejected, beta), at_reference, beta * size_of),
        "I3 own": relative(dataset.dpo_mean_rate(chosen, chosen, rejected, beta), own, beta * size_of),
        "I3 general": relative(dataset.mean_rate(probe, *parts), elsewhere, slope * size_of),
    }


def _outcomes(model: UFM) -> Array:
    """Log-probabilities of every response of two tokens, after one prompt, [V^2]."""
    logits = jax.nn.log_softmax(model.features @ model.unembedding.T, axis=-1)
    return (logits[0][:, None] + logits[1:]).reshape(-1)


def _on_policy(draw: Draw, *, vocabulary: int, width: int) -> Errors:
    model = instances.random_model(draw, vocabulary, width, 1 + vocabulary)
    rewards = draw.normal((vocabulary**2,)) * jnp.exp(draw.uniform((), -2.0, 2.0))
    preference = jax.nn.sigmoid(rewards[:, None] - rewards[None, :])
    size = jnp.exp(draw.uniform((), -3.0, 1.0))
    step = UFM(draw.normal(model.unembedding.shape) * size, draw.normal(model.features.shape) * size)
    before = _outcomes(model)

    def changes(moved: UFM) -> tuple[Array, Array]:
        return dataset.labelled_changes(before, _outcomes(moved) - before, preference)

    change = _outcomes(jax.tree.map(jnp.add, model, step)) - before
    chosen, rejected = dataset.labelled_changes(before, change, preference)
    kl, margin, scale = dataset.divergence(before, change), chosen - rejected, jnp.abs(change).max()
    predicted = dataset.on_policy_chosen(kl, margin)
    rates = jax.jvp(changes, (model,), (step,))[1]
    at_start = jnp.abs(jax.jvp(_outcomes, (model,), (step,))[1]).max()
    return {
        "N1": jnp.maximum(relative((chosen + rejected) / 2, -kl, scale), relative(chosen, predicted, scale)),
        "N1 falls against KL": (chosen < 0) != (kl > margin / 2),
        "N1 clear": jnp.abs(chosen) > CLEAR * scale,
        "N1 fell": chosen < 0,
        "N2": relative(rates[0], (rates[0] - rates[1]) / 2, at_start),
    }


def _groups(draw: Draw, **size: int) -> Errors:
    """A clipped surrogate at the policy that sampled, with the advantages of random rewards."""
    i = instances.random_batch(draw, **size)
    responses = i.probe
    advantage = draw.normal((responses.tokens.shape[0],))
    c = (advantage - advantage.mean()) / len(advantage)
    old = jax.lax.stop_gradient(log_probs(i.model, responses))

    def surrogate(m: UFM) -> Array:
        ratio = jnp.exp(log_probs(m, responses) - old)
        return -jnp.minimum(c * ratio, c * jnp.clip(ratio, 0.8, 1.28)).sum()[None]

    kernel = gram(i.model, responses)
    expected = rates_by_autodiff(i.model, surrogate, responses)[0]
    return {"GR": relative(dataset.group_rates(kernel, c), expected, jnp.abs(c).max() * jnp.abs(kernel).max())}


SETTINGS = {"products": (_products, BATCH), "on policy": (_on_policy, OUTCOMES), "groups": (_groups, BATCH)}


_seen_by = shared_sweeps(SETTINGS)


@exact(
    "I3",
    "three inner products: DPO at the reference changes the mean ln pi of any probes at beta/2 (<G_P, G+> - "
    "<G_P, G->); any loss at <G_P, U+> + <G_P, U->",
    "derived",
)
def _three_products(ctx: Context) -> Outcome:
    seen = _seen_by(ctx, "products")
    return largest(jnp.stack([jnp.asarray(seen[n]) for n in ("I3", "I3 own", "I3 general")]).max(0))


@exact(
    "N1",
    "on-policy pairs, any labels and any update: the mean of both changes is -KL(before, after), so that the chosen "
    "changes by half the margin less KL",
    "derived",
)
def _null(ctx: Context) -> Outcome:
    return largest(_seen_by(ctx, "on policy")["N1"])


@exact("N1f", "on-policy pairs: the chosen falls if and only if KL exceeds half the margin", "derived", tolerance=0)
def _null_falls(ctx: Context) -> Outcome:
    seen = _seen_by(ctx, "on policy")
    against, clear, fell_of = (np.asarray(seen[n]) for n in ("N1 falls against KL", "N1 clear", "N1 fell"))
    found, fell = exceptions({"against": against, "clear": clear}), float(fell_of.mean())
    return Outcome(value=found.value, n=found.n, detail={**found.detail, "share that fell": fell})


exact(
    "N2",
    "on-policy pairs: at the start the chosen rises at half the rate of the margin, whatever the direction; KL is of "
    "second order",
    "derived",
)(lambda ctx: largest(_seen_by(ctx, "on policy")["N2"]))
exact(
    "GR",
    "a clipped policy-gradient loss of a group changes its responses at sum_j c_j K_ij where it was sampled",
    "derived; Deng et al., arXiv 2505.18830, for the head's part",
)(lambda ctx: largest(_seen_by(ctx, "groups")["GR"]))
