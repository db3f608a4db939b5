"""What to do about a verdict: each line with the number it follows from, and its price.

Effects in nats are those this project measured: an epoch of DPO, IPO and RPO over 2,083 pairs of HH-RLHF (README).
"""

from collections.abc import Callable

from ches_jax.displacement.verdict import Diagnosis

Line = tuple[str, str, str]
"""What to do, because of what, at what price."""
FILTERED = (
    "in an experiment with 256 pairs, leaving out the half of highest influence reduced the fall of held-out chosen "
    "by 1.8 nats of 12.7, of highest CHES by 1.4, a random half by 0"
)
MEASURED = "in an experiment with 2,083 human pairs, held-out chosen changed by -0.05 nats with DPO, by +0.27 with RPO"


def advice(diagnosis: Diagnosis) -> tuple[Line, ...]:
    """Lines of advice, the first thing to do first."""
    rules: tuple[Callable[[Diagnosis], Line | None], ...] = (
        _undecided,
        _nothing,
        _loss_does_not_fall,
        _memorised,
        _early_stop,
        _sft_term,
        _filter,
        _harm,
        _texts,
    )
    return tuple(line for rule in rules if (line := rule(diagnosis)) is not None)


def _fell(diagnosis: Diagnosis) -> bool:
    return diagnosis.verdict in ("displaced", "chosen_down")


def _undecided(diagnosis: Diagnosis) -> Line | None:
    if diagnosis.verdict != "undecided":
        return None
    because = f"chosen {diagnosis.chosen} over {diagnosis.pairs} {diagnosis.unit}"
    if diagnosis.scale == "sign":
        return "say --beta NUMBER", "beta is not known", "nothing"
    if diagnosis.unit != "pairs":
        command = "compare the two models pair by pair: ches diagnose --before BASE --after TRAINED --pairs HELD-OUT"
        return command, because, "two passes over the held-out pairs"
    return "watch more held-out pairs (--holdout N, --eval-pairs FILE)", because, "a pass over them at each evaluation"


def _nothing(diagnosis: Diagnosis) -> Line | None:
    if diagnosis.verdict == "not_displaced":
        return "nothing needs to change", f"chosen {diagnosis.chosen} did not fall", "nothing"
    return None


def _loss_does_not_fall(diagnosis: Diagnosis) -> Line | None:
    if diagnosis.verdict == "chosen_down" and diagnosis.directions["margin"] == "down":
        because = f"margin {diagnosis.margin} fell too: the run does not learn its pairs, which is not displacement"
        return "lower the learning rate, and look at the data (ches doctor)", because, "another run"
    return None


def _memorised(diagnosis: Diagnosis) -> Line | None:
    training = diagnosis.beside
    if _fell(diagnosis) and training is not None and training.directions["chosen"] == "up":
        because = f"training chosen {training.chosen} rose while held-out chosen {diagnosis.chosen} fell: memorised"
        return "fewer epochs, or more data", because, "less fit to the training pairs"
    return None


def _early_stop(diagnosis: Diagnosis) -> Line | None:
    curve = diagnosis.curve
    if not _fell(diagnosis) or curve is None or len(curve.steps) < 4:
        return None
    best = int(curve.chosen.argmax())
    if 0 < best < len(curve.steps) - 1 and curve.chosen[best] > diagnosis.tolerance:
        because = f"chosen was highest, {curve.chosen[best]:+.3f}, at step {curve.steps[best]}"
        return f"take the checkpoint near step {curve.steps[best]}", because, "a smaller margin"
    return None


def _sft_term(diagnosis: Diagnosis) -> Line | None:
    if not _fell(diagnosis):
        return None
    because = f"chosen {diagnosis.chosen}; {MEASURED}"
    return (
        'add a likelihood term (RPO: TRL loss_type=["sigmoid", "sft"], ches train --sft 1)',
        because,
        "one coefficient to choose",
    )


def _filter(diagnosis: Diagnosis) -> Line | None:
    if not _fell(diagnosis):
        return None
    if scored := [row for row in diagnosis.worst if row.get("influence") is not None]:
        worst = max(scored, key=lambda row: row["influence"])
        because = (
            f"influence: training on row {worst['index']} moves the probes' chosen by {-worst['influence']:+.3g} nats"
        )
        command = "leave out the pairs with the highest influence: ches select --by influence --keep lowest:0.75"
        return command, because, "those pairs; compare with as many at random"
    find = "ches influence --model BASE --pairs TRAIN --probes HELD-OUT"
    command = f"find the pairs that cause it: {find}, then ches select --by influence"
    return command, FILTERED, "six forward passes and the pairs that are left out; compare with --control random"


def _harm(diagnosis: Diagnosis) -> Line | None:
    if diagnosis.harm.answer == "harmful":
        met = next(c for c in diagnosis.harm.criteria if c.outcome == "met")
        return "do not use this checkpoint", f"{met.name}: {met.evidence}", "another run"
    return None


def _texts(diagnosis: Diagnosis) -> Line | None:
    missing = [c for c in diagnosis.harm.criteria if c.of_texts and c.outcome == "not measured"]
    if _fell(diagnosis) and diagnosis.harm.answer == "undecided" and missing:
        return (
            "find out where the mass went",
            f"{missing[0].evidence}",
            "a few hundred texts of both models",
        )
    return None
