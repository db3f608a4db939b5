r"""Three inner products of mean gradients, and a sentence of them: does a data set lower chosen responses, and why?

A loss of whole responses moves parameters along :math:`u = U_+ + U_-`, what it makes of the chosen and of the rejected
responses of the training pairs:

.. math:: U_\pm = \frac{1}{N} \sum_j a^\pm_j \nabla \ln \pi(y^\pm_j), \qquad
          a^\pm_j = -\frac{\partial \ell_j}{\partial \ln \pi(y^\pm_j)}

so that the mean log-probability of any probes' chosen responses, with mean gradient :math:`G_P`, has under gradient
flow the rate

.. math:: \frac{d}{dt}\, \overline{\ln \pi}(P) = \langle G_P, U_+ \rangle + \langle G_P, U_- \rangle

For DPO at the reference :math:`U_\pm = \pm\frac{\beta}{2} G_\pm`, with the mean gradients of chosen and rejected
responses. With the probes replaced by the training pairs themselves that is
:math:`\frac{\beta}{2} (\|G_+\|^2 - \langle G_+, G_- \rangle)`: minus CHES's own expression, for the data set as a whole
and with true gradients. In the metric M of an optimiser (``metric.Metric.of_run``) the same products are in nats.
"""

from dataclasses import asdict, dataclass
from typing import Any

import jax

from ches_jax.models.precision import inner

Tree = dict[str, jax.Array]
NEARLY = 0.1
"""Share of the larger part below which two parts of opposite sign nearly cancel."""


@dataclass(frozen=True)
class Effect:
    """What the loss does to the mean log-probability of some chosen responses, at first order."""

    from_chosen: float
    """By raising the training pairs' chosen responses."""
    from_rejected: float
    """By lowering their rejected responses."""

    @property
    def total(self) -> float:
        """Both."""
        return self.from_chosen + self.from_rejected


@dataclass(frozen=True)
class Products:
    """Norms and cosines of mean gradients, rates under gradient flow, changes in nats in the optimiser's metric.

    ``None`` where there is nothing to divide by, and for probes where there are none.
    """

    norm_chosen: float | None
    norm_rejected: float | None
    norm_probes: float | None
    cos_chosen_rejected: float | None
    cos_probes_chosen: float | None
    cos_probes_rejected: float | None
    train_rate: Effect
    train_nats: Effect
    probes_rate: Effect | None
    probes_nats: Effect | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def sentence(self) -> str:
        """Whether the data set lowers chosen responses, and why."""
        whose, nats = ("the probes'", self.probes_nats) if self.probes_nats else ("its own", self.train_nats)
        cosine = self.cos_probes_rejected if self.probes_nats else self.cos_chosen_rejected
        word = "lowers" if nats.total < 0 else "raises"
        text = (
            f"at first order this data set {word} {whose} chosen responses, by {nats.total:+.2f} nats in the mean: "
            f"{nats.from_chosen:+.2f} from raising its chosen responses, {nats.from_rejected:+.2f} from lowering its "
            "rejected ones"
        )
        if abs(nats.total) < NEARLY * max(abs(nats.from_chosen), abs(nats.from_rejected)):
            text += "; the two nearly cancel, since its chosen and rejected responses pull alike"
        elif cosine is not None and nats.from_rejected < 0:
            text += f", which {whose} chosen ones resemble"
        if cosine is not None:
            text += f" (cosine of mean gradients, {whose} chosen and its rejected: {cosine:+.2f})"
        return text


@jax.jit
def _in_metric(tree: Tree, metric: Tree) -> Tree:
    return {k: x * metric[k].astype(x.dtype) for k, x in tree.items()}


def products(
    chosen: Tree, rejected: Tree, metric: Tree, own: Tree, weight_rejected: float, probes: Tree | None
) -> Products:
    """The products of trees.

    Args:
      chosen: U+.
      rejected: U-.
      metric: M.
      own: mean gradient of the training pairs' chosen responses.
      weight_rejected: mean of a-, by which U- is divided to be a mean gradient; 0: the loss reads none.
      probes: G_P.
    """

    def size(tree: Tree) -> float:
        return float(inner(tree, tree)) ** 0.5

    moved = [_in_metric(side, metric) for side in (chosen, rejected)]

    def effects(tree: Tree) -> tuple[Effect, Effect]:
        plain = Effect(float(inner(tree, chosen)), float(inner(tree, rejected)))
        return plain, Effect(float(inner(tree, moved[0])), float(inner(tree, moved[1])))

    def cosine(a: Tree | None, b: Tree, sign: float) -> float | None:
        if a is None or not sign:
            return None
        sizes = size(a) * size(b)
        return None if sizes == 0 else float(inner(a, b)) / sizes * (1 if sign > 0 else -1)

    train_rate, train_nats = effects(own)
    of_probes = (None, None) if probes is None else effects(probes)
    return Products(
        norm_chosen=size(own),
        norm_rejected=size(rejected) / abs(weight_rejected) if weight_rejected else None,
        norm_probes=None if probes is None else size(probes),
        cos_chosen_rejected=cosine(own, rejected, weight_rejected),
        cos_probes_chosen=cosine(probes, own, 1.0),
        cos_probes_rejected=cosine(probes, rejected, weight_rejected),
        train_rate=train_rate,
        train_nats=train_nats,
        probes_rate=of_probes[0],
        probes_nats=of_probes[1],
    )
