"""What rewards of a log mean: changes in nats, directions only, or no changes at all."""

import sys

import numpy as np
import pytest

from ches_jax.displacement.log_changes import log_changes, recovered_beta
from ches_jax.displacement.readers.log import log_of
from ches_jax.displacement.readers.run_settings import RunSettings
from ches_jax.displacement.verdict import diagnose_changes
from ches_jax.errors import ChesError

SIDES = ("chosen", "rejected")
NOTHING = RunSettings()


def training(steps=40, chosen=-0.02, rejected=-0.05, extra=None):
    return [
        {"step": 5 * (i + 1), "rewards/chosen": chosen * i, "rewards/rejected": rejected * i, **(extra or {})}
        for i in range(steps)
    ]


def evaluations(beta=0.1, count=4, **shift):
    """An evaluation of the same pairs each time: rewards are beta times the change of their logps."""
    out = []
    for i in range(count):
        logps = {"chosen": -120 - 2.0 * i, "rejected": -150 - 3.0 * i}
        rewards = {f"eval_rewards/{s}": beta * (v - {"chosen": -120, "rejected": -150}[s]) for s, v in logps.items()}
        out.append({"step": 50 * (i + 1), **rewards, **{f"eval_logps/{s}": v for s, v in logps.items()}, **shift})
    return out


def changes(entries, settings=NOTHING, beta=None, rewards="auto"):
    return log_changes(log_of("log", entries), settings, beta, rewards)


def test_held_out_rewards_count_and_training_ones_stand_beside():
    found = changes([*training(), *evaluations()])
    assert found.held_out and found.unit == "evaluations" and found.chosen.tolist() == pytest.approx([0, -2, -4, -6])
    assert found.beside is not None and found.beside.unit == "steps" and not found.beside.held_out
    assert found.beside.chosen[-1] == pytest.approx(-0.02 * 39 / 0.1)
    assert changes(evaluations()).beside is None and changes(training(), beta=0.1).unit == "steps"


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.5])
def test_beta_is_the_slope_of_held_out_rewards(beta):
    assert recovered_beta(log_of("log", evaluations(beta))) == pytest.approx(beta)
    found = changes(evaluations(beta))
    assert found.scale == "nats" and found.chosen[-1] == pytest.approx(-6)
    assert any(f"beta {beta:g} (slope of eval rewards" in note for note in found.caveats)


def test_a_slope_that_the_log_does_not_tell_is_not_taken():
    entries = evaluations()
    for i, e in enumerate(entries):
        e["eval_rewards/chosen"] += 0.3 * (-1) ** i
    assert recovered_beta(log_of("log", entries)) is None
    still = [{**e, "eval_logps/chosen": -120.0, "eval_logps/rejected": -150.0} for e in evaluations()]
    assert recovered_beta(log_of("log", still)) is None
    assert recovered_beta(log_of("log", evaluations(count=1))) is None


def test_without_beta_only_directions_are_reported():
    found = changes(training())
    assert found.scale == "sign" and any("--beta NUMBER" in note for note in found.caveats)
    assert changes(training(), RunSettings(0.5, "args.json")).chosen[-1] == pytest.approx(-0.02 * 39 / 0.5)
    assert changes(training(), beta=0.25).chosen[-1] == pytest.approx(-0.02 * 39 / 0.25)


def test_betas_that_contradict_each_other_are_refused():
    with pytest.raises(ChesError, match=r"beta is 0.5 \(--beta\) and 0.1 \(slope"):
        changes(evaluations(), beta=0.5)
    with pytest.raises(ChesError, match=r"beta is 0.1 \(slope.* and 0.3 \(args.json\)"):
        changes(evaluations(), RunSettings(0.3, "args.json"))
    with pytest.raises(ChesError, match="--beta -1: expected a positive number"):
        changes(evaluations(), beta=-1)


def reference_free(first=-0.12, last=-0.10, count=40, logps=True):
    out = []
    for i, value in enumerate(np.linspace(first, last, count)):
        entry = {"step": 5 * (i + 1), "rewards/chosen": value, "rewards/rejected": value - 0.03 - 0.001 * i}
        if logps:
            entry |= {f"logps/{s}": entry[f"rewards/{s}"] / 0.1 for s in SIDES}
        out.append(entry)
    return out


def few_entries(rewards):
    """Ten entries, the first at a tenth of the run, of a function from the number of the entry to both rewards."""
    both = ((10 * t, rewards(t)) for t in range(1, 11))
    return [{"step": step, "rewards/chosen": chosen, "rewards/rejected": rejected} for step, (chosen, rejected) in both]


@pytest.mark.parametrize(
    "rewards",
    [
        lambda t: (-0.3 * t, -0.5 * t),
        lambda t: (-0.3 * t**0.5, -0.5 * t**0.5),
        lambda t: (-(1 - np.exp(-t)), -3 * (1 - np.exp(-t))),
        lambda t: (-1.5, -1.5 - 0.35 * t),  # chosen fell at once and stayed, rejected goes on
    ],
    ids=["straight", "slower and slower", "at its end after three entries", "one side alone at its end"],
)
def test_a_policy_that_left_its_reference_before_the_first_entry_is_believed(rewards):
    assert changes(few_entries(rewards), beta=0.1).scale == "nats"


@pytest.mark.parametrize(
    ("entries", "settings", "reason"),
    [
        (reference_free(), NOTHING, "its rewards are 0.1 times its logps"),
        (reference_free(logps=False), NOTHING, r"first rewards are -0.12 and -0.15.*without a reference"),
        (few_entries(lambda t: (-1.5 - 0.075 * t, -1.75 - 0.15 * t)), NOTHING, r"first rewards are -1.57 and -1.9.*"),
        (training(extra={"log_odds_ratio": -0.6}), NOTHING, "the odds ratio of ORPO"),
        (training(), RunSettings(loss="simpo"), "trained with SIMPO, which has no reference"),
        (training(), RunSettings(loss="simpo+sft"), r"trained with SIMPO \+ SFT, which has no reference"),
        (training(), RunSettings(no_reference=True), "trained with reference_free, which leaves out the reference"),
        (reference_free(-30.0, -12.0), NOTHING, "its rewards are 0.1 times its logps"),
    ],
)
def test_rewards_without_a_reference_are_no_changes(entries, settings, reason):
    with pytest.raises(ChesError, match=reason):
        changes(entries, settings)


@pytest.mark.parametrize("steps", [1, 5])
def test_one_logged_step_has_no_verdict(steps):
    """The mean of a few logged steps has no known uncertainty, however far it is from 0."""
    diagnosed = diagnose_changes(changes(training(steps, chosen=-2.0, rejected=-5.0), beta=0.1))
    assert diagnosed.verdict == "undecided" and diagnosed.to_json()["chosen"]["low"] is None
    assert any("too few" in c for c in diagnosed.caveats)


def test_who_knows_better_can_say_that_rewards_are_changes():
    found = changes(reference_free(logps=False), beta=0.1, rewards="changes")
    assert found.scale == "nats" and found.chosen[-1] == pytest.approx(-1.0)


def test_the_message_tells_what_the_logps_did():
    with pytest.raises(ChesError, match=r"Its training logps went: chosen -1.2 to -1, rejected -1.5 to"):
        changes(reference_free())


@pytest.mark.parametrize("late", [0, 1])
def test_rewards_of_a_policy_that_starts_at_its_reference_are_changes(late):
    """Also where the log begins late: large first rewards of a late step say nothing."""
    entries = training()
    entries = entries[20 * late :]
    assert changes(entries, beta=0.1).scale == "nats"


def test_means_over_tokens_are_no_nats_of_responses():
    assert changes(training(), RunSettings(0.1, "args.json", "ipo")).scale == "per token"
    short = training(extra={"logps/chosen": -1.5, "logps/rejected": -2.0})
    found = changes(short, beta=0.1)
    assert found.scale == "per token" and any("means over tokens, or responses of a few" in n for n in found.caveats)
    assert changes(short, beta=0.1, rewards="changes").scale == "nats"
    sums = training(extra={"logps/chosen": -80.0, "logps/rejected": -90.0})
    assert changes(sums, RunSettings(0.1, "args.json", "ipo")).scale == "nats"


def test_one_of_several_losses_may_average():
    assert changes(training(), RunSettings(0.1, "args.json", "sigmoid+ipo")).scale == "per token"
    assert changes(training(), RunSettings(0.1, "args.json", "sigmoid+sft")).scale == "nats"
    notes = changes(training(), RunSettings(0.1, "args.json", "sigmoid+bco")).caveats
    assert any("chosen and rejected responses are of other prompts" in note for note in notes)


def test_an_option_that_weighs_tokens_outweighs_logps_that_look_like_sums():
    """A part of the tokens counts less: sums of these are no changes of responses in nats, however large they are."""
    settings = RunSettings(0.1, "args.json", "sigmoid", averaged="ld_alpha")
    found = changes([*training(), *evaluations()], settings)
    assert found.scale == "per token" and any("ld_alpha weighs the tokens" in note for note in found.caveats)
    assert changes(evaluations(), settings, beta=0.1).scale == "per token"
    assert changes(evaluations(), settings, rewards="changes").scale == "nats"


def test_changes_in_nats_need_no_beta():
    entries = [{"step": i, "displacement/dlogp_chosen": -i, "displacement/dlogp_rejected": -2 * i} for i in range(9)]
    found = changes(entries)
    assert found.scale == "nats" and found.chosen[-1] == -8 and found.rejected[-1] == -16


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"loss": 0.5, "learning_rate": 1e-5}], "has no rewards/chosen and rewards/rejected .it has loss"),
        ([{"reward": 0.5, "rewards/format/mean": 1.0, "kl": 0.1}], "a log of reinforcement learning"),
        ([{"critic/rewards/mean": 0.5, "actor/pg_loss": 0.1}], "a log of reinforcement learning"),
        ([{"rewards/chosen": 0.5}], "has rewards of chosen responses and none of rejected"),
        ([{"chosen_reward": 0.5, "reject_reward": 0.1, "reward_mean": 0.3}], "as the training of a reward model does"),
        ([{"current_steps": 5, "loss": 0.5}], "a trainer_log.jsonl of LLaMA-Factory leaves them out"),
    ],
)
def test_a_log_of_something_else_is_refused(entries, message):
    with pytest.raises(ChesError, match=message):
        changes([dict(e) for e in entries])


@pytest.mark.parametrize("bad", [float("nan"), "NaN", "Infinity", float("-inf"), sys.float_info.max])
def test_a_number_that_is_none_is_left_out_and_named(bad):
    entries = [*training(extra={"loss": 0.5}), *evaluations()]
    entries[7]["rewards/chosen"] = entries[0]["rewards/rejected"] = bad
    for e in entries[10:14]:
        e["loss"] = bad
    entries[-2]["eval_logps/rejected"] = entries[-1]["eval_rewards/accuracies"] = bad
    entries[-3]["eval_rewards/accuracies"] = 0.75
    found = changes(entries)
    assert (
        "left out as NaN or infinite: rewards/chosen at 1 of 40 entries (step 40), rewards/rejected at 1 of 40 entries "
        "(step 5), loss at 4 of 40 entries (steps 55, 60, 65, ...), eval_logps/rejected at 1 of 4 entries (step 150), "
        "eval_rewards/accuracies at 1 of 2 entries (step 200)"
    ) in found.caveats[0]
    assert found.chosen.tolist() == pytest.approx([0, -2, -4, -6])  # by the slope over the other evaluations
    assert found.curve is not None and found.curve.accuracy == 0.75
    assert found.beside is not None and len(found.beside.chosen) == 38
    assert found.beside.chosen[-1] == pytest.approx(-0.02 * 39 / 0.1)


def test_rewards_that_end_with_nan_are_refused_but_where_the_loss_is_finite():
    entries = training()
    for e in entries[30:]:
        e["rewards/chosen"] = float("nan")
    words = (
        r"rewards/chosen is NaN or infinite at 10 of 40 entries, first at step 155, and at the end: the run diverged"
    )
    with pytest.raises(ChesError, match=words):
        changes(entries, beta=0.1)
    with pytest.raises(ChesError, match=words):
        changes([*entries, *evaluations(count=1)], beta=0.1)
    alive = [{**e, "loss": 0.5} for e in entries]
    assert len(changes(alive, beta=0.1).chosen) == 30
    with pytest.raises(ChesError, match="at the end"):
        changes([*alive[:-1], {**alive[-1], "loss": float("nan")}], beta=0.1)


def test_a_set_without_a_finite_reward_is_left_out_and_none_is_refused():
    nan = float("nan")
    without = [{**e, "eval_loss": 0.6, "eval_rewards/rejected": nan} for e in evaluations()]
    found = changes([*training(), *without], beta=0.1)
    assert found.unit == "steps" and found.beside is None
    assert "eval_rewards/rejected at 4 of 4 entries" in found.caveats[0]
    turns = [
        {"step": i, "loss": 0.5, **{f"rewards/{s}": nan if (i + j) % 2 else 0.1 for j, s in enumerate(SIDES)}}
        for i in range(1, 9)
    ]
    with pytest.raises(ChesError, match=r"no step has finite rewards of both responses \(rewards/chosen at 4 of 8"):
        changes(turns, beta=0.1)


def test_of_two_entries_of_a_step_the_one_with_a_number_counts():
    again = [{"step": e["step"], "rewards/chosen": float("nan"), "grad_norm": 1.0} for e in training()]
    found = changes([entry for both in zip(training(), again, strict=True) for entry in both], beta=0.1)
    assert len(found.chosen) == 40 and not found.caveats[0].startswith("left out")


def test_unpaired_losses_are_reported():
    assert any("kto: chosen and rejected" in note for note in changes(training(), RunSettings(0.1, "x", "kto")).caveats)


def held_out_course(beta, reference=lambda step: 0.0, logged=False, logps=True):
    """Evaluations with a beta, and a reference in nats, for each step."""
    out = []
    for step in range(10, 130, 10):
        moved = {"chosen": -step / 20, "rejected": -step / 9}
        entry = {"step": step, **({"beta": beta(step)} if logged else {})}
        entry |= {
            f"eval_rewards/{s}": beta(step) * (moved[s] - reference(step) * (1 + (s == "rejected"))) for s in SIDES
        }
        out.append(entry | ({f"eval_logps/{s}": -120 + moved[s] for s in SIDES} if logps else {}))
    return out


def test_a_beta_that_was_changed_divides_each_reward_by_that_of_its_step():
    entries = held_out_course(lambda step: 0.1 + step / 200, logged=True)
    found = changes(entries, RunSettings(0.1, "args.json"))
    assert found.scale == "nats" and found.chosen[-1] == pytest.approx(-6) and found.chosen[0] == pytest.approx(-0.5)
    assert any("beta 0.15 to 0.7, each reward by that of its step" in note for note in found.caveats)
    with pytest.raises(ChesError, match=r"logs a beta that goes from 0.15 to 0.7; leave out --beta"):
        changes(entries, beta=0.1)
    constant = held_out_course(lambda step: 0.2, logged=True, logps=False)
    assert changes(constant).chosen[-1] == pytest.approx(-6)


@pytest.mark.parametrize(
    "entries",
    [
        held_out_course(lambda step: 0.1 + step / 200),
        held_out_course(lambda step: 0.1, lambda step: -(step // 40) * 2.0),
    ],
    ids=["beta changes", "the reference moves"],
)
def test_rewards_that_leave_the_line_of_their_logps_are_no_changes_since_one_reference(entries):
    with pytest.raises(ChesError, match="do not follow its held-out logps along a line"):
        changes(entries, RunSettings(0.1, "args.json"))
    coarse = [{k: float(f"{v:.4g}") for k, v in e.items()} for e in held_out_course(lambda step: 0.1)]
    assert changes(coarse, RunSettings(0.1, "args.json")).chosen[-1] == pytest.approx(-6, rel=1e-2)


def test_evaluations_of_other_pairs_each_time_need_no_line():
    entries = held_out_course(lambda step: 0.1)
    for i, entry in enumerate(entries):
        entry["eval_logps/chosen"] += 9 * (-1) ** i
    assert changes(entries, RunSettings(0.1, "args.json")).chosen[-1] == pytest.approx(-6)


def test_logps_that_are_not_finite_tell_no_beta():
    entries = held_out_course(lambda step: 0.1)
    entries[3]["eval_logps/chosen"] = float("-inf")
    assert changes(entries, RunSettings(0.1, "args.json")).chosen[-1] == pytest.approx(-6)


def test_logps_of_an_empty_batch_do_not_hide_that_the_others_are_sums():
    nan = float("nan")
    entries = training(extra={"logps/chosen": -80.0, "logps/rejected": -90.0, "kl": 0.1})
    entries[3] |= {"logps/chosen": nan, "rewards/chosen": nan}
    assert changes(entries, beta=0.1).scale == "nats"
    short = [e | {"logps/chosen": -1.0, "logps/rejected": nan} for e in training()]
    assert changes(short, beta=0.1).scale == "per token"
    assert changes([e | {"logps/chosen": nan} for e in training()], beta=0.1).scale == "nats"


def test_a_reference_that_follows_the_policy_is_reported():
    with pytest.raises(ChesError, match="its reference is moved to the policy"):
        changes(training(), RunSettings(0.1, "args.json", moving_reference=True))


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize("count", [8, 12])
def test_few_entries_without_logps_show_that_there_is_no_reference(prefix, count):
    entries = [
        {"step": 10 * (i + 1), f"{prefix}rewards/chosen": -2.5 + i / 90, f"{prefix}rewards/rejected": -2.7 - i / 90}
        for i in range(count)
    ]
    with pytest.raises(ChesError, match=r"first rewards are -2\.5 and -2\.7"):
        changes(entries, beta=0.1)
    grown = [{**e, **{k: v * i / 9 for k, v in e.items() if k != "step"}} for i, e in enumerate(entries, 1)]
    assert changes(grown, beta=0.1).scale == "nats"


def test_batches_of_kto_without_one_of_the_sides_are_left_out():
    nan = float("nan")
    entries = [
        {"step": i, "kl": 0.1, "rewards/chosen": nan if i % 3 == 0 else -0.1 * i, "rewards/rejected": -0.2 * i}
        for i in range(1, 31)
    ]
    assert len(changes(entries, beta=0.1).chosen) == 20
    with pytest.raises(ChesError, match="NaN or infinite at 10 of 30"):
        changes([{k: v for k, v in e.items() if k != "kl"} for e in entries], beta=0.1)
    apart = [{"step": i, "kl": 0.1, f"rewards/{SIDES[i % 2]}": -0.1} for i in range(30)]
    with pytest.raises(ChesError, match="no logged step has rewards of chosen and of rejected responses both"):
        changes(apart, beta=0.1)
