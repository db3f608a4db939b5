"""Named toy models, one for each regime of displacement: twelve tokens with a meaning, one prompt, one pair.

The unembedding of a token is a point on an axis from refusal to assent, its strength, plus a direction of its own. A
pair trains along W_+ - W_-, so what gains is told by strengths alone: for two refusals of different strength the
difference points to *assent*. The scale s turns W into s W and h into h / s: the same model, in which displacement sets
in once features are small against unembeddings.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from theory.ufm import UFM, Pairs, Responses, pair_log_probs, rescale

TOKENS = ("Yes", "yes", "Sure", "Certainly", "No", "no", "Never", "Nope", "Maybe", "I", "The", "It")
STRENGTH = (1.0, 2.0, 0.6, 0.8, -0.7, -0.9, -1.4, -0.8, 0.0, 0.1, 0.0, -0.1)
OWN_DIRECTION = 0.3
"""Length of the part of an unembedding that no other token shares."""
BETA = 0.1
DURATION = 60.0


class Construction(NamedTuple):
    """A pair in a toy model, and what the theory says will become of it."""

    name: str
    chosen: str
    rejected: str
    scale: float
    model: UFM
    pairs: Pairs
    labels: tuple[str, ...]
    """Of each token, seen from y+: "chosen", "same", "opposite" or "other"."""
    verdict: str
    winner: str


def probabilities_at_start(chosen: str, rejected: str, companion: str) -> Array:
    """The chosen token and a companion likely, the rejected one rare, the rest rarer."""
    weights = dict.fromkeys(TOKENS, 0.01) | {rejected: 0.05, companion: 0.44, chosen: 0.45}
    p = jnp.array([weights[token] for token in TOKENS])
    return p / p.sum()


def semantic_model(chosen: str, rejected: str, companion: str) -> UFM:
    """The model at scale 1: W as described above, h such that the prompt has ``probabilities_at_start``."""
    n = len(TOKENS)
    w = jnp.concatenate([jnp.array(STRENGTH)[:, None], OWN_DIRECTION * jnp.eye(n)], axis=1)
    h = jnp.linalg.lstsq(w, jnp.log(probabilities_at_start(chosen, rejected, companion)))[0]
    return UFM(w, h[None, :])


def label_tokens(chosen: str) -> tuple[str, ...]:
    """Labels by the sign of a token's strength against that of y+."""
    sign = STRENGTH[TOKENS.index(chosen)] > 0

    def label(token: str, strength: float) -> str:
        if token == chosen:
            return "chosen"
        if abs(strength) < 0.3:
            return "other"
        return "same" if (strength > 0) == sign else "opposite"

    return tuple(label(t, s) for t, s in zip(TOKENS, STRENGTH, strict=True))


def construct(
    name: str, chosen: str, rejected: str, companion: str, scale: float, verdict: str, winner: str
) -> Construction:
    """A pair of single tokens on the only prompt."""
    one, here = jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32)
    sides = [Responses(jnp.full((1, 1), TOKENS.index(t), jnp.int32), here, one) for t in (chosen, rejected)]
    model = rescale(semantic_model(chosen, rejected, companion), scale)
    return Construction(name, chosen, rejected, scale, model, Pairs(*sides), label_tokens(chosen), verdict, winner)


def constructions() -> tuple[Construction, ...]:
    """All of them; the first of each pair is the same model with features that are too large for displacement."""
    return (
        construct("yes_no_large_features", "Yes", "No", "yes", 2.0, "none", "Yes"),
        construct("yes_no", "Yes", "No", "yes", 12.0, "benign", "yes"),
        construct("no_never_large_features", "No", "Never", "Yes", 2.0, "none", "No"),
        construct("no_never", "No", "Never", "Yes", 12.0, "catastrophic", "yes"),
        construct("sure_yes", "Sure", "Yes", "Never", 8.1, "catastrophic", "Never"),
    )


def dpo_of(c: Construction):
    """DPO's loss of a construction as a function of the parameters; the reference is the starting point."""
    start = [lp[0] for lp in pair_log_probs(c.model, c.pairs)]

    def loss(model: UFM) -> Array:
        chosen, rejected = pair_log_probs(model, c.pairs)
        return jax.nn.softplus(-BETA * (chosen[0] - rejected[0] - start[0] + start[1]))

    return loss
