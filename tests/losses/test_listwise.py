"""Losses of lists against loops over the definitions, in float64; what is padding is never read."""

import json
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.losses import LossInputs, get_loss, incentives

LOGPS = [[-8.0, -9.5, -14.0, -11.0], [-6.0, -7.0, 0.0, 0.0]]
REF = [[-9.0, -8.5, -12.0, -11.5], [-7.5, -6.0, 0.0, 0.0]]
SCORES = [[0.9, 0.5, 0.5, 0.1], [1.0, 0.25, 0.0, 0.0]]
TOKENS = [[4, 5, 7, 3], [3, 2, 0, 0]]
MASK = [[1, 1, 1, 1], [1, 1, 0, 0]]
SIZES = (4, 2)
BETA = 0.5
NAMES = ("list_mle", "list_softmax", "lipo_lambda", "pro")


@pytest.fixture
def lists(x64):
    fields = {"logp_responses": LOGPS, "ref_logp_responses": REF, "scores": SCORES, "response_mask": MASK}
    arrays: dict[str, Any] = {k: jnp.array(v, float) for k, v in fields.items()}
    return LossInputs(**arrays, response_tokens=jnp.array(TOKENS))


def rows():
    """Scaled log-ratios, scores and mean log-probabilities of each row, as lists."""
    for row, n in enumerate(SIZES):
        s = [BETA * (LOGPS[row][i] - REF[row][i]) for i in range(n)]
        yield s, SCORES[row][:n], [LOGPS[row][i] / TOKENS[row][i] for i in range(n)], LOGPS[row][:n]


def list_mle(s, scores, r, logps):
    return -sum(log(exp(s[k]) / sum(exp(v) for v in s[k:])) for k in range(len(s) - 1))


def list_softmax(s, scores, r, logps, temperature=0.5):
    labels, policy = [exp(v / temperature) for v in scores], [exp(v) for v in s]
    return -sum(p / sum(labels) * log(q / sum(policy)) for p, q in zip(labels, policy, strict=True))


def lipo_lambda(s, scores, r, logps):
    rank = {i: 1 + place for place, i in enumerate(sorted(range(len(s)), key=lambda i: -s[i]))}
    total = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            if scores[i] > scores[j]:
                gain = abs(2 ** scores[i] - 2 ** scores[j])
                discount = abs(1 / log(1 + rank[i]) - 1 / log(1 + rank[j]))
                total += gain * discount * log(1 + exp(-(s[i] - s[j])))
    return total


def pro(s, scores, r, logps, sft_coeff=0.05):
    total = 0.0
    for k in range(len(r)):
        worse = [i for i in range(len(r)) if scores[i] < scores[k]]
        if worse:
            temperatures = {i: 1 / (scores[k] - scores[i]) for i in worse}
            own = exp(r[k] / min(temperatures.values()))
            total -= log(own / (own + sum(exp(r[i] / t) for i, t in temperatures.items())))
    # the authors' code: mean log-probabilities in the ranking, the sum in the likelihood
    return total - sft_coeff * (len(r) - 1) ** 2 * logps[0]


def test_losses_of_lists_are_those_of_rax(x64):
    """Its DCG weights have the logarithm of base 2, times the length of the list."""
    golden = json.loads(Path(__file__).with_name("rax_golden.json").read_text(encoding="utf-8"))
    s, mask = np.array(golden["s"]), np.array(golden["mask"], float)
    batch = LossInputs(
        logp_responses=jnp.asarray(s / BETA),
        ref_logp_responses=jnp.zeros(s.shape),
        scores=jnp.asarray(golden["scores"]),
        response_mask=jnp.asarray(mask),
        response_tokens=jnp.ones(s.shape, int),
    )
    factor = {"lipo_lambda": log(2) * mask.sum(-1)}
    for name, expected in golden["values"].items():
        value, _ = get_loss(name, **HYPER[name])(batch)
        np.testing.assert_allclose(value * factor.get(name, 1.0), expected, rtol=1e-6, err_msg=name)


HYPER = {
    "list_mle": {"beta": BETA},
    "list_softmax": {"beta": BETA, "temperature": 0.5},
    "lipo_lambda": {"beta": BETA},
    "pro": {},
}


@pytest.mark.parametrize("name", NAMES)
def test_values(name, lists):
    value, aux = get_loss(name, **HYPER[name])(lists)
    np.testing.assert_allclose(value, [globals()[name](*row) for row in rows()], rtol=1e-12)
    assert aux["rewards/margins"].shape == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_incentives_are_differences_of_the_loss_and_padding_has_none(name, lists):
    loss = get_loss(name, **HYPER[name])
    push = incentives(loss)(lists).chosen
    step = 1e-6
    for row, n in enumerate(SIZES):
        for i in range(4):
            up, down = (
                float(loss(lists._replace(logp_responses=lists.logp_responses.at[row, i].add(d)))[0].sum())
                for d in (step, -step)
            )
            if i < n:
                assert float(push[row, i]) == pytest.approx(-(up - down) / (2 * step), abs=1e-7)
            else:
                assert float(push[row, i]) == 0.0


def test_two_responses_are_a_pair(lists):
    """Plackett-Luce of two is DPO's Bradley-Terry; a falling row pushes the best up and the worst down."""
    pair = LossInputs(
        logp_chosen=jnp.array([-6.0]),
        logp_rejected=jnp.array([-7.0]),
        ref_logp_chosen=jnp.array([-7.5]),
        ref_logp_rejected=jnp.array([-6.0]),
    )
    dpo = get_loss("dpo", beta=BETA)(pair)[0]
    np.testing.assert_allclose(get_loss("list_mle", beta=BETA)(lists)[0][1], dpo[0], rtol=1e-12)
    push = incentives(get_loss("list_mle", beta=BETA))(lists).chosen
    assert push[0, 0] > 0 > push[0, 3] and push[1, 0] == pytest.approx(-push[1, 1])


@pytest.mark.parametrize("name", NAMES)
def test_padding_may_hold_anything_finite(name, lists):
    loss = get_loss(name, **HYPER[name])
    filler = jnp.where(jnp.array(MASK) == 1, lists.logp_responses, 123.0)
    scores = jnp.where(jnp.array(MASK) == 1, lists.scores, 9.0)
    np.testing.assert_allclose(
        loss(lists._replace(logp_responses=filler, scores=scores))[0], loss(lists)[0], rtol=1e-12
    )


def test_scores_fall():
    """What the rows of these tests promise."""
    assert all(a >= b for row, n in zip(SCORES, SIZES, strict=True) for a, b in pairwise(row[:n]))
