r"""What falls on policy: responses that the first model wrote itself lose the Kullback-Leibler divergence.

For a response y drawn from the first policy :math:`\pi_0`, whatever the loss and the data,

.. math:: E[\ln \pi_t(y|x) - \ln \pi_0(y|x)] = -KL(\pi_0(\cdot|x) \,\|\, \pi_t(\cdot|x))

so for a pair of such responses, in the mean over prompts, with the margin's change :math:`\Delta m`,

.. math:: \Delta_+ = \Delta m / 2 - KL, \qquad \Delta_- = - \Delta m / 2 - KL

and chosen falls exactly when the divergence exceeds half the margin. It is the level that a fall is compared with: to
move a policy at all costs its own responses so much.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.displacement.changes import Changes
from ches_jax.displacement.intervals import Interval, of_pairs
from ches_jax.errors import ChesError


@dataclass(frozen=True)
class OnPolicy:
    """The split of the changes of on-policy pairs."""

    kl: Interval
    """KL(before || after) of a response, nats."""
    half_margin: Interval
    """Half of the margin's change, nats."""
    pairs: int
    own: bool
    """Whether these are the pairs that are diagnosed; else answers that the first model gave for the comparison."""
    reverse_kl: Interval | None = None
    """KL(after || before) of an answer of the second model, nats, where it gave some."""
    tokens: tuple[Interval, Interval] | None = None
    """Mean length of the answers of the first and of the second model, tokens."""
    left_out: int = 0
    """Prompts that are not among ``pairs`` because an answer was empty."""

    def line(self, chosen: float) -> str:
        """For a person; ``chosen``: mean change of the chosen responses that are diagnosed."""
        if self.own:
            return (
                f"on policy: chosen = half the margin {self.half_margin} less KL(before || after) {self.kl} nats; it "
                f"{'falls, since KL exceeds' if self.kl.mean > self.half_margin.mean else 'rises, since KL is below'} "
                "half the margin"
            )
        more = -chosen - self.kl.mean
        text = (
            f"on policy: {2 * self.pairs} answers of the first model itself fell by KL(before || after) = {self.kl} "
            f"nats; the chosen responses here fell by {abs(more):.3f} {'more' if more > 0 else 'less'}"
        )
        if self.reverse_kl is not None:
            text += f"; of the second model's answers KL(after || before) = {self.reverse_kl} nats"
        if self.tokens is not None:
            text += f"; answers of {self.tokens[0].mean:.1f} tokens before, {self.tokens[1].mean:.1f} after"
        if self.left_out:
            text += f"; {self.left_out} prompts with an empty answer are left out"
        return text

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return {
            "kl": self.kl.to_json(),
            "half_margin": self.half_margin.to_json(),
            "reverse_kl": None if self.reverse_kl is None else self.reverse_kl.to_json(),
            "tokens": None if self.tokens is None else [side.to_json() for side in self.tokens],
            "pairs": self.pairs,
            "left_out": self.left_out,
            "of": "the pairs" if self.own else "answers of the first model",
        }


def split(changes: Changes, *, own: bool = True) -> OnPolicy:
    """The split of changes of pairs whose two responses were drawn from the first model.

    >>> found = split(Changes(np.full(10, -4.0), np.full(10, -8.0), "an example"))
    >>> found.kl.mean, found.half_margin.mean
    (6.0, 2.0)
    """
    both = np.stack([-(changes.chosen + changes.rejected) / 2, (changes.chosen - changes.rejected) / 2])
    kl, half_margin = of_pairs(both, changes.records)
    return OnPolicy(kl, half_margin, len(changes.chosen), own)


def rows_of(responses: Path) -> list[dict[str, Any]]:
    """The answers in a directory of `ches generate`."""
    return [json.loads(x) for x in (responses / "responses.jsonl").read_text(encoding="utf-8").splitlines()]


def prompts_of(rows: list[dict[str, Any]]) -> int:
    """How many prompts were answered."""
    return len({row["row_id"] for row in rows})


def mean_tokens(rows: list[dict[str, Any]]) -> Interval:
    """Mean length of the answers, over prompts."""
    prompts = np.unique([row["row_id"] for row in rows], return_inverse=True)[1]
    return of_pairs(np.array([[float(len(row["token_ids"])) for row in rows]]), prompts)[0]


def write_sampled_pairs(responses: Path, out: Path) -> Path:
    """Two samples of each prompt as a pair of token ids, exactly as they were drawn.

    Args:
      responses: directory of `ches generate --samples 2` at temperature 1.
      out: JSON lines to write.

    Raises:
      ChesError: no prompt has two samples that differ.
    """
    samples: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(responses):
        samples.setdefault(row["row_id"], []).append(row)
    pairs = [
        {"prompt_ids": a["prompt_ids"], "chosen_ids": a["token_ids"], "rejected_ids": b["token_ids"]}
        for a, b, *_ in (rows for rows in samples.values() if len(rows) > 1)
        if a["token_ids"] and b["token_ids"]
    ]
    if not pairs:
        raise ChesError(f"{responses}: no prompt has two samples; ches generate --samples 2 makes them")
    out.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return out
