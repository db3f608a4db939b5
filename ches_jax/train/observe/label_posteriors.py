"""LCPO's probability, under the model of an evaluation, that the label of each watched pair is right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ches_jax.losses import Loss, LossInputs
from ches_jax.losses.inputs import LENGTHS, REFERENCE
from ches_jax.train.data.examples import Examples
from ches_jax.train.observe.pair_logprobs import PairLogps
from ches_jax.types import Eos, TokenPair

POSTERIOR = "label/posterior"
OF_PAIRS = REFERENCE | LENGTHS
"""What an evaluation knows of every watched pair."""


def in_doubt(loss: Loss) -> bool:
    """Whether a loss estimates how sure its labels are, from what an evaluation knows of a pair."""
    return "label_prior" in loss.needs and loss.needs - {"label_prior", "weights", "log_delta"} <= OF_PAIRS | NORMS


NORMS = frozenset({"head_norm_chosen", "head_norm_rejected"})


@dataclass
class LabelPosteriors:
    """``posteriors(logps)``, from the log-probabilities of each set; ``state`` is the loss's, which the run sets."""

    loss: Loss
    sets: Mapping[str, Sequence[TokenPair]]
    """The watched pairs."""
    train: Examples
    held_out: Examples
    reference: Mapping[str, Any]
    """Log-probabilities of all examples under the reference, by the name of their set; empty where there is none."""
    eos: Eos = "include"
    state: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reference = {name: self._of_watched(name) for name in self.sets} if self.reference else {}
        self._program = jax.jit(lambda batch: self.loss(batch)[1][POSTERIOR])

    def _of_watched(self, name: str) -> PairLogps:
        examples = self.train if name == "train" else self.held_out
        place = {pair.row_id: i for i, pair in enumerate(examples.pairs)}
        which = [place[pair.row_id] for pair in self.sets[name]]
        return PairLogps(*(np.asarray(side)[which] for side in self.reference[name]))

    def __call__(self, logps: Mapping[str, PairLogps]) -> dict[str, np.ndarray]:
        """Probabilities by the name of the set, in the order of its pairs."""
        return {name: self._posterior(name, now) for name, now in logps.items()}

    def _posterior(self, name: str, now: PairLogps) -> np.ndarray:
        pairs, ref = self.sets[name], self._reference.get(name, PairLogps(np.zeros(0), np.zeros(0)))
        one = jnp.ones(())
        fields: dict[str, Any] = {
            "logp_chosen": now.chosen,
            "logp_rejected": now.rejected,
            "ref_logp_chosen": ref.chosen,
            "ref_logp_rejected": ref.rejected,
            "chosen_tokens": np.array([len(p.chosen.targets(self.eos)) for p in pairs]),
            "rejected_tokens": np.array([len(p.rejected.targets(self.eos)) for p in pairs]),
            "weights": np.ones(len(pairs)),
            "head_norm_chosen": one,
            "head_norm_rejected": one,
            **self.loss.initial,
            **self.state,
        }
        read: dict[str, Any] = {k: jnp.asarray(v) for k, v in fields.items() if k in self.loss.needs}
        return np.asarray(self._program(LossInputs(**read)), np.float64)
