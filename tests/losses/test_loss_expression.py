"""Losses as they are written: what an expression means, what it refuses, and that commands reach every loss."""

import inspect
import json
import re
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ches_jax.losses as losses
from ches_jax.errors import ChesError
from ches_jax.losses import WRAPPERS, distinct_losses, from_trl, get_loss, loss_names, parse_loss, weighted_sum
from ches_jax.losses.inputs import JOINT, LENGTHS, REFERENCE, REWARDS
from ches_jax.losses.registry import hyper_names
from ches_jax.train.config import TrainConfig
from ches_jax.train.objective import COLUMN_FIELDS, SUPPLIED, get_objective


def test_a_weighted_sum_of_a_wrapper_and_a_loss_is_its_arithmetic(batch64):
    b = {name: np.asarray(value) for name, value in batch64._asdict().items() if not isinstance(value, tuple)}
    margin = b["logp_chosen"] - b["ref_logp_chosen"] - b["logp_rejected"] + b["ref_logp_rejected"]
    per_token = b["logp_chosen"] / b["chosen_tokens"], b["logp_rejected"] / b["rejected_tokens"]
    weight = np.minimum(1.0, np.exp(per_token[0] + per_token[1]))
    expected = weight * np.log1p(np.exp(-0.3 * margin)) - 0.2 * per_token[0]
    value, aux = parse_loss("wpo(dpo(beta=0.3)) + 0.2*sft_token")(batch64)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(aux["terms/sft_token"], -per_token[0], rtol=1e-12)
    np.testing.assert_allclose(aux["rewards/margins"], 0.3 * margin, rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "resolved"),
    [
        ("dpo", "dpo(beta=0.1)"),
        ("dpo(0.3)", "dpo(beta=0.3)"),
        (" wpo( dpo ) + sft*0.2 ", "wpo(dpo(beta=0.1)) + 0.2*sft"),
        ("0.5*(dpo + sft) + 0*kto", "0.5*(dpo(beta=0.1) + sft)"),
        ("smooth(ipo_mean, 0.2)", "smooth(ipo_mean(tau=0.1), label_smoothing=0.2)"),
        ("rc(gate(dpo))", "rc(gate(dpo(beta=0.1), alpha=10, threshold=0.1), decay=0.98)"),
        (
            "weighted(dpo + sft_sum) + lcpo(simpo)",
            "weighted(dpo(beta=0.1) + sft_sum) + lcpo(simpo(beta=2, gamma=1), prior=0.9, decay=0.9)",
        ),
        ('["sigmoid", "ipo", "sft"]', "sigmoid(beta=0.1) + ipo_mean(tau=0.1) + sft"),
        ("2*dpo", "2*dpo(beta=0.1)"),
        ("+".join(["dpo"] * 30), " + ".join(["dpo(beta=0.1)"] * 30)),
    ],
)
def test_what_is_resolved_shows_every_value_and_reads_back(text, resolved):
    assert repr(parse_loss(text)) == resolved
    assert repr(parse_loss(resolved)) == resolved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpo + sfft", "no loss is named 'sfft'; the nearest are sft"),
        ("wpoo(dpo)", "no wrapper is named 'wpoo'; the nearest are wpo"),
        ("wpo(dpo(betta=1))", "no hyper-parameter 'betta'; it has: beta"),
        ("gate(dpo, alfa=1)", "no number 'alfa'; did you mean alpha"),
        ("simpo(2, 1)", "a number without a name; simpo has beta, gamma"),
        ("gate(dpo, alpha=1e999)", "alpha: expected a number, once"),
        ("dpo + kto", "its terms are of different inputs: dpo.* reads pairs; kto.* reads single responses"),
        ("sft + d2o", "sft reads chosen responses; d2o.* reads a rejected response with samples"),
        ("bco_pair + 2*bco_pair(0.1)", "would share one state .reward_mean."),
        ("rc(rc(dpo))", "would share one state .log_delta."),
        ("lcpo(lcpo(dpo))", "needs a stateless loss of pairs"),
        ("0*dpo + 0*sft", "its weights sum to nothing"),
        ("wpo(0*dpo)", "its weights sum to nothing"),
        ("dpo + 0*(0*sft)", "its weights sum to nothing"),
        ("2*(kto + 0.1*dpo)", "its terms are of different inputs"),
        ("bco + bco_pair", "its terms are of different inputs"),
        ("bco + kto + bco", "would share one state .reward_mean."),
        ("bco_pair + weighted(bco_pair)", "would share one state .reward_mean."),
        ("rc(dpo) + rc(ipo_sum)", "would share one state .log_delta."),
        ("lcpo(dpo) + 0.5*lcpo(simpo)", "would share one state .label_prior."),
        ("dpo + dove", "dpo.* reads pairs; dove.* reads pairs of prompts with their responses, taken together"),
        ("dove + sft", "its terms are of different inputs"),
        ("wpo(dove)", "needs a loss of summed log-probabilities of pairs"),
        ("dpo + list_mle", "its terms are of different inputs: dpo.* reads pairs; list_mle.* reads lists"),
        ("sft + kto", "its terms are of different inputs"),
        ("smooth(pro)", "needs a stateless loss of pairs"),
        ("wpo(lipo_lambda)", "needs a loss of summed log-probabilities of pairs"),
        ("soft(kto)", "needs a stateless loss of pairs"),
        ("lcpo(odpo)", "reads scores, and these say which response is better"),
        ("soft(dpo + 0.1*rebel)", "reads scores"),
        ("dpo - sft", "a loss with a minus"),
        ("-1*dpo", "a weight is a finite number, 0 or more"),
        ("weighted(dpo + weighted(sft))", "weighted already"),
        ("wpo", "wraps a loss: wpo.dpo."),
        ("wpo(dpo, sft)", "a sum is one"),
        ("dpo(wpo)", "dpo is a loss and wraps none"),
        ("dpo:0.8", "not an expression at letter 4"),
        ("", "not an expression"),
        ("dpo.beta", "no part of an expression"),
        ("__import__('os')", "no wrapper is named '__import__'"),
        ("(lambda: dpo)()", "no part of an expression"),
        ("2*3", "a product is of one number and one loss"),
        ("wpo(" * 17 + "dpo" + ")" * 17, "more than 16 brackets"),
        ("(" * 900 + "dpo", "not an expression"),
        ("dpo+" * 300 + "dpo", "at most 1000"),
        ('["sigmoid", 2]', "a list is TRL's loss_type"),
        ('["simpo"]', "no loss_type of TRL is named 'simpo'"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ChesError, match=message):
        parse_loss(text)


def test_labels_in_doubt_exchange_prompts_too(x64):
    """Of a pair of two prompts each response keeps its own."""
    nats = {"logp_joint_chosen": -20.0, "logp_joint_rejected": -31.0}
    nats |= {"ref_logp_joint_chosen": -22.0, "ref_logp_joint_rejected": -32.0, "label_probability": 0.75}
    fields: Any = {k: jnp.array([v]) for k, v in nats.items()}
    value, _ = parse_loss("soft(dove(0.5))")(losses.LossInputs(**fields))
    np.testing.assert_allclose(value, 0.75 * np.log1p(np.exp(-0.5)) + 0.25 * np.log1p(np.exp(0.5)), rtol=1e-12)


def test_numbers_beside_an_expression_are_those_of_one_bare_name():
    assert repr(parse_loss("dpo", {"beta": 0.3})) == "dpo(beta=0.3)"
    with pytest.raises(ChesError, match=r"in an expression numbers stand with their loss, NAME\(beta=0.3\)"):
        parse_loss("dpo + sft", {"beta": 0.3})


def test_lists_of_trl_take_its_weights_and_its_beta():
    assert repr(from_trl(["sigmoid", "ipo"], [0.8, 0.2], beta=0.3)) == "0.8*sigmoid(beta=0.3) + 0.2*ipo_mean(tau=0.3)"
    with pytest.raises(ChesError, match="1 weights of 2 losses"):
        from_trl(["sigmoid", "sft"], [1.0])


def test_lists_of_trl_smooth_labels_as_much_as_trl_does():
    """Not at all where nothing is said, also ``robust``, whose default here is another one; ``sigmoid`` never does."""
    names = ["robust", "aot", "hinge", "sigmoid", "exo_pair"]
    smoothed = [get_loss("robust", label_smoothing=0.2), get_loss("aot", label_smoothing=0.2)]
    rest = [get_loss("hinge"), get_loss("sigmoid")]
    expected = weighted_sum([(1.0, x) for x in [*smoothed, *rest, get_loss("exo_pair", label_smoothing=0.2)]])
    assert repr(from_trl(names, label_smoothing=0.2)) == repr(expected)
    assert repr(parse_loss("['robust']")) == "robust(beta=0.1, label_smoothing=0)"
    assert repr(from_trl(["exo_pair"])) == repr(get_loss("exo_pair"))


WITH_OPTIONS = {"with_sft": "--sft", "with_tokens": "the rules of tokens"}


def test_every_loss_wrapper_and_rule_is_reached_by_a_command():
    """``ches train --loss`` takes each by its name; functions that are no wrapper have an option of their own."""
    for name in loss_names():
        assert get_objective(name, {}).name == name
    for name, one in WRAPPERS.items():
        reached = get_objective(f"{name}(dpo)", {}, weighted=name == "weighted", soft_labels=name == "soft")
        assert repr(reached).startswith(f"{name}(dpo(beta=0.1)")
        assert inspect.getdoc(one.make)
    reachable = {one.make.__name__ for one in WRAPPERS.values()} | {*WITH_OPTIONS}
    assert {n for n in losses.__all__ if n.startswith("with_")} <= reachable
    rules = {"every_token", "given_weights", "unsure_tokens", "beyond_shared_length", "differing_spans"}
    assert rules <= WRAPPERS.keys() and rules <= {*losses.__all__}


HELPERS = {
    "get_loss": "--loss",
    "parse_loss": "--loss",
    "from_trl": "--loss '[...]'",
    "weighted_sum": "+ in an expression",
    "kind_of": "what rows --pairs must have",
    "mean_loss": "a loop of one's own",
    "loss_names": "the message of an unknown name",
    "describe": "the page of objectives",
    "distinct_losses": "the page of objectives",
    "incentives": "ches diagnose, ches report",
    "swap": "soft, smooth, unbiased, lcpo",
    "unpair": "ches verify, a loop of one's own",
    "kto_baseline": "kto",
    "label_posterior": "lcpo",
    "log_calibration": "rc",
    "moving_average": "rc",
    "weighted_sums": "the rules of tokens",
}
"""Public functions that are no loss, wrapper or rule, and what they are a part of."""


def test_every_public_name_is_a_part_of_some_command():
    """A new function of the package without a name in expressions, an option or a place in this list is found."""
    made = {one.make.__name__ for one in WRAPPERS.values()} | {*WRAPPERS, *WITH_OPTIONS}
    functions = {n for n in losses.__all__ if inspect.isfunction(getattr(losses, n))}
    assert functions - made == HELPERS.keys()


def test_every_field_that_a_loss_reads_has_its_source_in_the_command():
    """What training fills is what losses and wrappers read, no more and no less, newest ones included."""
    every = [get_loss(name) for name in loss_names()] + [
        WRAPPERS[name].make(get_loss("dpo"), **WRAPPERS[name].defaults) for name in WRAPPERS
    ]
    read = frozenset().union(*(loss.needs for loss in every))
    assert read == SUPPLIED
    assert {"dove", "t_reg", "bco", "list_mle", "lipo_lambda", "pro", "sparsepo", "d2o"} <= {*loss_names()}
    options = {option.removeprefix("--").replace("-", "_") for option in COLUMN_FIELDS.values()}
    assert options | {"token_weights", "rewards", "loss", "sft_pairs"} <= {f.name for f in fields_of(TrainConfig)}


def test_a_wrapper_of_a_column_asks_for_it():
    for name, option in (("weighted", "--weights"), ("soft", "--label-probabilities")):
        with pytest.raises(ChesError, match=f"say in which column it is: {option} COLUMN"):
            get_objective(f"{name}(dpo)", {})
    assert repr(get_objective("weighted(dpo) + sft", {}, weighted=True)) == "weighted(dpo(beta=0.1)) + sft"


def test_aliases_are_counted_once():
    names = distinct_losses()
    assert sorted(n for all_names in names.values() for n in all_names) == sorted(loss_names())
    readme = (Path(losses.__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"one of (\d+) \[objectives", readme) == [str(len(names))]


def test_every_loss_and_wrapper_is_on_the_page():
    """``python tools/objectives.py page`` was run after the registry changed."""
    page = (Path(losses.__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    for names in distinct_losses().values():
        for name in names:
            assert f"`{get_loss(name)!r}`" in page
        assert f"\n### {names[0]}\n" in page
    for name in WRAPPERS:
        assert f"\n### {name}\n" in page


def test_every_loss_and_wrapper_has_a_run_in_the_table():
    """``python tools/objectives.py measure`` was run, and the page written, after the registry changed."""
    docs = Path(losses.__file__).parents[2] / "docs"
    runs = json.loads((docs / "objectives.json").read_text(encoding="utf-8"))["runs"]
    same = {"every_token", "given_weights"}  # with weights of 1 what they wrap
    assert {*distinct_losses()} | {f"{name}(dpo)" for name in WRAPPERS.keys() - same} <= runs.keys()
    page = (docs / "objectives.md").read_text(encoding="utf-8")
    assert all(f"| `{run['loss']}` |" in page for run in runs.values())
    columns = [f"{prefix}{name}" for prefix in ("", "held_out_") for name in ("chosen", "rejected", "margin")]
    assert all(run[c][1] <= run[c][0] <= run[c][2] for run in runs.values() for c in columns)


def test_every_loss_of_single_pairs_is_in_the_picture():
    """``python tools/incentive_plots.py`` was run after the registry changed."""
    images = Path(losses.__file__).parents[2] / "docs" / "images"
    pictures = [images / f"incentives{width}.svg" for width in ("", "_narrow")]
    drawn, narrow = (re.findall(r'font-weight="bold">(\w+)</text>', p.read_text(encoding="utf-8")) for p in pictures)
    read = REFERENCE | LENGTHS | REWARDS | JOINT
    single = (get_loss(name) for name in distinct_losses())
    assert drawn == narrow == [one.name for one in single if one.needs <= read and not one.needs_whole_batches]


def test_every_loss_reads_back_from_what_it_shows():
    for name in loss_names():
        assert repr(parse_loss(repr(get_loss(name)))) == repr(get_loss(name))
        assert set(hyper_names(name)) == set(get_loss(name).hyper)


def test_sft_of_an_update_in_parts_takes_the_share_of_the_whole(batch64):
    share = jnp.full(4, 4 / 20)
    whole = get_loss("sft")(batch64._replace(pairs_per_token=share))[0]
    np.testing.assert_allclose(whole, -batch64.logp_chosen * 0.2, rtol=1e-12)


def test_other_options_of_trl_under_its_names():
    said = from_trl(
        ["sigmoid", "sft"], [1.0, 0.5], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3, beta=0.2
    )
    assert repr(said) == "fdpo_alpha(beta=0.2, alpha=0.3) + 0.5*sft"
    assert repr(from_trl("sigmoid", f_divergence_type="js_divergence")) == "fdpo_js(beta=0.1)"
    assert repr(from_trl("discopop", discopop_tau=0.2)) == "discopop(beta=0.1, tau=0.2)"
    assert repr(from_trl(["ipo", "sft"], ld_alpha=0.25)) == "beyond_shared_length(ipo_mean(tau=0.1), alpha=0.25) + sft"
    with pytest.raises(ChesError, match="f_divergence_type='js_divergence': of loss_type sigmoid here, not of hinge"):
        from_trl(["sigmoid", "hinge"], f_divergence_type="js_divergence")
    with pytest.raises(ChesError, match="expected one of reverse_kl, forward_kl, js_divergence, alpha_divergence"):
        from_trl("sigmoid", f_divergence_type="kl")
    with pytest.raises(ChesError, match="None is no text"):
        parse_loss(None)  # type: ignore[arg-type]
