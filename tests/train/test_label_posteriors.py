"""The probability, at an evaluation, that the label of each watched pair is right."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ches_jax.losses import parse_loss
from ches_jax.train.data.examples import Examples
from ches_jax.train.observe.label_posteriors import LabelPosteriors, in_doubt
from ches_jax.train.observe.pair_logprobs import PairLogps

SIDES = ("chosen", "rejected")


def pair(row_id: str) -> Any:
    sides = {side: SimpleNamespace(targets=lambda eos: (1, 2)) for side in SIDES}
    return SimpleNamespace(row_id=row_id, **sides)


def test_posteriors_are_bayes_rule_with_the_share_of_right_labels_of_the_state():
    """The watched pairs are some of the examples, in another order: each has its own reference."""
    every = [pair("a"), pair("b"), pair("c")]
    reference = {"train": PairLogps(np.array([-9.0, -5.0, -7.0]), np.array([-6.0, -8.0, -7.0]))}
    posteriors = LabelPosteriors(
        parse_loss("lcpo(dpo(beta=0.5), prior=0.9)"),
        {"train": [every[2], every[0]]},
        Examples(every, {}),
        Examples([], {}),
        reference,
    )
    now = {"train": PairLogps(np.array([-6.0, -8.0]), np.array([-9.0, -9.0]))}
    z = 0.5 * np.array([(-6 + 7) - (-9 + 7), (-8 + 9) - (-9 + 6)])
    for eta, state in ((0.9, {}), (0.6, {"label_prior": np.float32(0.6)})):
        posteriors.state = state
        right, wrong = eta / (1 + np.exp(-z)), (1 - eta) / (1 + np.exp(z))
        np.testing.assert_allclose(posteriors(now)["train"], right / (right + wrong), rtol=1e-5)


def test_posteriors_count_the_tokens_that_the_run_counts():
    """Of a loss by token, where a terminator counts or not."""
    sides = {side: SimpleNamespace(targets=lambda eos: (1, 2) if eos == "include" else (1,)) for side in SIDES}
    loss = parse_loss("lcpo(simpo(beta=1, gamma=0))")
    one: Any = SimpleNamespace(row_id="a", **sides)
    for eos, tokens in (("include", 2), ("exclude", 1)):
        posteriors = LabelPosteriors(loss, {"train": [one]}, Examples([one], {}), Examples([], {}), {}, eos)  # type: ignore[arg-type]
        z = (-2.0 + 4.0) / tokens
        now = {"train": PairLogps(np.array([-2.0]), np.array([-4.0]))}
        expected = 0.9 / (1 + np.exp(-z)) / (0.9 / (1 + np.exp(-z)) + 0.1 / (1 + np.exp(z)))
        np.testing.assert_allclose(posteriors(now)["train"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "known"),
    [("lcpo(dpo)", True), ("lcpo(simpo) + sft", True), ("dpo", False), ("lcpo(unsure_tokens(dpo))", False)],
)
def test_posteriors_need_nothing_that_an_evaluation_does_not_know(text, known):
    assert in_doubt(parse_loss(text)) == known
