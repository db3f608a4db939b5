"""Named toy models, one for each regime of displacement: twelve tokens with a meaning, one prompt, one pair.

The unembedding of a token is a point on an axis from refusal to assent, its strength, plus a direction of its own. A
pair trains along W_+ - W_-, so the strengths alone decide what gains: for two refusals of different strength the
difference points to *assent*. The scale s turns W into s W and h into h / s: the same model, in which displacement sets
in once features are small against unembeddings.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ches_jax.errors import ChesError
from theory.statements import theorems
from theory.toy.dynamics import (
    Kind,
    displacement_kind,
    gradient_flow,
    mass_by_label,
    token_log_probabilities,
    token_probabilities,
)
from theory.toy.search import run_once
from theory.toy.ufm import UFM, Pairs, Responses, gram, pair_log_probs, rescale

TOKENS = ("Yes", "yes", "Sure", "Certainly", "No", "no", "Never", "Nope", "Maybe", "I", "The", "It")
STRENGTH = (1.0, 2.0, 0.6, 0.8, -0.7, -0.9, -1.4, -0.8, 0.0, 0.1, 0.0, -0.1)
OWN_DIRECTION = 0.3
"""Length of the part of an unembedding that no other token shares."""
BETA = 0.1
SLOPE = -BETA / 2
"""DPO's slope at the start, where the model is its own reference."""
DURATION, REPORTS = 60.0, 121


class Construction(NamedTuple):
    """A pair in a toy model, and what the theory says will happen to it."""

    name: str
    chosen: str
    rejected: str
    scale: float
    model: UFM
    pairs: Pairs
    labels: tuple[str, ...]
    """Of each token, seen from y+: "chosen", "same", "opposite" or "other"."""
    kind: Kind | None = None
    """What the theory says: how y+ is displaced."""
    winner: str | None = None
    """And which token gains most."""
    linear: bool = False
    """Whether the features are frozen: then nothing is displaced."""


class Run(NamedTuple):
    """What became of a construction: S moments of its whole trajectory, and words for it."""

    times: Float[np.ndarray, " S"]
    losses: Float[np.ndarray, " S"]
    log_probs: Float[np.ndarray, "S V"]
    kernels: Float[np.ndarray, "S 2 2"]
    """K of the pair: [[K++, K+-], [K+-, K--]]."""
    masses: dict[str, np.ndarray]
    """Probability of each label's tokens together."""
    terms: dict[str, float]
    """Theorem 4 at the start; they add up to the rate of ln pi(y+)."""
    direction: Float[np.ndarray, " V"]
    """Theorem 5 at the start: <W_z, W_+ - W_->, which orders the rates of all other tokens."""
    change: float
    """Of ln pi(y+) over the run, nats."""
    kind: Kind
    winner: str
    first_by_theorem_5: str

    @property
    def rate(self) -> float:
        """d/dt ln pi(y+) at the start."""
        return sum(self.terms.values())


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
    name: str,
    chosen: str,
    rejected: str,
    companion: str,
    scale: float,
    kind: Kind | None = None,
    winner: str | None = None,
) -> Construction:
    """A pair of single tokens of ``TOKENS`` on the only prompt, to be trained by ``flows``.

    Args:
      name: of the construction, under which ``flows`` returns its run.
      chosen: the preferred token.
      rejected: the dispreferred token.
      companion: a third token, as likely at the start as the chosen one.
      scale: s, which makes W into s W and h into h / s: the larger, the more is displaced.
      kind: what the theory predicts, for a claim that compares; ``Run.kind`` is what happens.
      winner: the token that the theory predicts to gain most; ``Run.winner`` is what happens.

    Raises:
      ChesError: a token that is none of ``TOKENS``, or fewer than three tokens.

    >>> construct("mild", "No", "Never", "Yes", scale=2.0).labels[:5]
    ('opposite', 'opposite', 'opposite', 'opposite', 'chosen')
    """
    unknown = [t for t in (chosen, rejected, companion) if t not in TOKENS]
    if unknown or len({chosen, rejected, companion}) < 3:
        raise ChesError(
            f"{name}: expected three different tokens of {', '.join(TOKENS)}; got {chosen}, {rejected}, {companion}"
        )
    one, context = jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32)
    sides = [Responses(jnp.full((1, 1), TOKENS.index(t), jnp.int32), context, one) for t in (chosen, rejected)]
    model = rescale(semantic_model(chosen, rejected, companion), scale)
    return Construction(name, chosen, rejected, scale, model, Pairs(*sides), label_tokens(chosen), kind, winner)


def constructions() -> tuple[Construction, ...]:
    """All of them; the first of each pair is the same model with features that are too large for displacement."""
    return (
        construct("yes_no_large_features", "Yes", "No", "yes", 2.0, "none", "Yes"),
        construct("yes_no", "Yes", "No", "yes", 12.0, "benign", "yes"),
        construct("no_never_large_features", "No", "Never", "Yes", 2.0, "none", "No"),
        construct("no_never", "No", "Never", "Yes", 12.0, "catastrophic", "yes"),
        construct("sure_yes", "Sure", "Yes", "Never", 8.1, "catastrophic", "Never"),
    )


def dpo_from(start: UFM, pairs: Pairs) -> Callable[[UFM], Array]:
    """DPO's loss as a function of the parameters; the reference is the starting point."""
    reference = [lp[0] for lp in pair_log_probs(start, pairs)]

    def loss(model: UFM) -> Array:
        chosen, rejected = pair_log_probs(model, pairs)
        return jax.nn.softplus(-BETA * (chosen[0] - rejected[0] - reference[0] + reference[1]))

    return loss


def dpo_of(c: Construction) -> Callable[[UFM], Array]:
    """DPO's loss of a construction."""
    return dpo_from(c.model, c.pairs)


def linear_model(c: Construction) -> Construction:
    """The construction with frozen features."""
    return c._replace(name=f"{c.name}_linear", linear=True, kind="none", winner=c.chosen)


def flows(which: Sequence[Construction]) -> dict[str, Run]:
    """Gradient flow of DPO from every construction, all in one compiled call."""
    # close together at first, when most of the probability moves
    times = DURATION * jnp.linspace(0.0, 1.0, REPORTS) ** 3

    def one(model: UFM, pairs: Pairs, linear: Array) -> tuple[UFM, Array, Array]:
        loss = dpo_from(model, pairs)
        path = gradient_flow(loss, model, times, trainable=UFM(True, ~linear))  # type: ignore[arg-type]
        return path, jax.vmap(loss)(path), jax.vmap(lambda m: gram(m, *pairs))(path)

    models, pairs = jax.tree.map(lambda *parts: jnp.stack(parts), *[(c.model, c.pairs) for c in which])
    runs = run_once(jax.vmap(one), models, pairs, jnp.array([c.linear for c in which]))
    each = [jax.tree.map(lambda a, i=i: a[i], runs) for i in range(len(which))]
    return {c.name: _tell(c, np.asarray(times), *parts) for c, parts in zip(which, each, strict=True)}


def _tell(c: Construction, times: np.ndarray, path: UFM, losses: Array, kernels: Array) -> Run:
    """The run in numbers and words."""
    probabilities = jax.vmap(token_probabilities)(path)
    masses = {name: np.asarray(mass) for name, mass in mass_by_label(probabilities, c.labels).items()}
    log_probs = np.asarray(jax.vmap(token_log_probabilities)(path))
    gains = {name: float(mass[-1] - mass[0]) for name, mass in masses.items() if name != "chosen"}
    chosen, rejected = TOKENS.index(c.chosen), TOKENS.index(c.rejected)
    w, h = c.model
    fourth = theorems.theorem_4(w, h[0], jnp.int32(chosen), jnp.int32(rejected), jnp.asarray(SLOPE))
    direction = np.asarray(w @ (w[chosen] - w[rejected]))
    third = np.array([i not in (chosen, rejected) for i in range(len(TOKENS))])
    change = float(log_probs[-1, chosen] - log_probs[0, chosen])
    return Run(
        times=times,
        losses=np.asarray(losses),
        log_probs=log_probs,
        kernels=np.asarray(kernels),
        masses=masses,
        terms={name: float(value) for name, value in fourth.terms.items()},
        direction=direction,
        change=change,
        kind=displacement_kind(change, float(losses[-1] - losses[0]), gains, "same", "opposite"),
        winner=TOKENS[int((probabilities[-1] - probabilities[0]).argmax())],
        first_by_theorem_5=TOKENS[int(np.where(third, direction, -np.inf).argmax())],
    )
