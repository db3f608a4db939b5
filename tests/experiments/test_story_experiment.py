"""The story: its arithmetic on made-up runs, its report from them, and (slow) a whole run of the tiny scale."""

import json

import numpy as np
import pytest

from ches_jax.report.render import render
from experiments.framework.item import configure, execute
from experiments.story import SCALES, figures, page, rows, stages, tables
from experiments.story.config import ARMS
from experiments.story.summary import arm, at_margin, verdict

PAIRS = 60


def around(means, *shape):
    """Values whose means over pairs are exactly those."""
    noise = np.random.default_rng(len(shape)).normal(0, 0.1, (*shape, PAIRS))
    return np.asarray(means)[..., None] + noise - noise.mean(-1, keepdims=True)


def courses():
    """Two orders of a run whose chosen falls by 4 and then by 6 nats while its margin grows by 1 and then by 2."""
    chosen = around([0.0, -4.0, -6.0], 2, 3)
    return np.stack([chosen, chosen - around([0.0, 1.0, 2.0], 2, 3)], axis=1)


def ends(chosen, margin):
    values = around(chosen, 2)
    return np.stack([values, values - around(margin, 2)], axis=1)


def test_the_chosen_at_a_margin_is_that_of_the_first_crossing():
    chosen, margins = np.array([0.0, -4.0, -6.0, -7.0]), np.array([0.0, 1.0, 0.8, 2.0])
    assert at_margin(0.5, chosen, margins) == -2.0  # and not the later one
    assert at_margin(1.4, chosen, margins) == pytest.approx(-6.5)
    assert np.isnan(at_margin(2.1, chosen, margins)) and np.isnan(at_margin(-0.1, chosen, margins))


@pytest.mark.parametrize(
    ("chosen", "margin", "expected"),
    [
        (-7.0, 2.0, "chosen falls more"),
        (-6.0, 2.0, "not distinguished from DPO"),
        (-3.0, 3.0, "chosen falls less, with more margin"),
        (-3.0, 2.0, "chosen falls less, margin not distinguished"),
        (-3.0, 1.0, "chosen falls less, at less margin; better than stopping DPO there"),
        (-4.0, 1.0, "chosen falls less, at less margin; stopping DPO there does as much"),
        (-5.0, 1.0, "chosen falls less, at less margin; stopping DPO earlier does more"),
        (-1.0, -1.0, "chosen falls less, paid in margin"),
    ],
)
def test_an_arm_is_worth_what_its_intervals_say(chosen, margin, expected):
    found = arm(ends(chosen, margin), courses())
    assert verdict(found) == expected
    assert found["gain"]["mean"] == pytest.approx(chosen + 6, abs=0.1)


def made_up():
    """A result as ``summarise`` returns it."""
    plain = courses()
    arms = {name: {**arm(ends(-3.0, 1.0), plain), "train_chosen": -1.0} for name in ARMS}
    mean = {"mean": -6.0, "low": -7.0, "high": -5.0}
    sets = {"chosen": mean, "rejected": mean, "margin": mean, "chosen_fell": 0.9, "pairs": 60}
    course = {"chosen": [0.0, -6.0], "rejected": [0.0, -8.0]}
    worst = {
        "influence": 0.1,
        "from_chosen": 0.0,
        "from_rejected": 0.1,
        "prompt": "<p>",
        "chosen": "c",
        "rejected": "r",
    }
    criterion = {"name": "the held-out margin fell", "outcome": "not met", "evidence": "margin +2", "of_texts": False}
    return {
        "item": "story",
        "scale": "small",
        "config": {"model": "m", "pairs": "p"},
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "device": "1 x cpu (cpu)",
        "machine": "a machine",
        "seeds": [0],
        "result": {
            "course": {"steps": [0, 16], "held_out": course, "train": course},
            "sets": {"held_out": sets, "train": sets},
            "diagnosis": {
                "verdict": "displaced",
                "chosen": mean,
                "margin": mean,
                "harm": {"answer": "undecided", "criteria": [criterion]},
            },
            "causes": {"push_down": 0.9, "concentration": {"share_of_fall": {"10%": 0.3}}, "worst": [worst]},
            "plain": {"chosen": [0.0, -4.0, -6.0], "margin": [0.0, 1.0, 2.0]},
            "arms": arms,
        },
    }


def test_report_and_page_say_every_arm_and_escape_texts(tmp_path):
    result = made_up()
    lines = rows(result)
    assert len(lines) == 3 + len(ARMS) and lines[0].verdict == "90% of held-out chosen responses fell"
    assert all(label in tables(result) for label in ("SFT term per token (RPO)", "without a random half (control)"))
    text = render(page(result))
    assert "lowered 90% of 60 held-out chosen responses, by 6.0 nats" in text
    held = result["result"]["sets"]["held_out"]
    words = (
        ((1.0, 3.0), "the margin grew by 2.0<"),
        ((-3.0, -1.0), "the margin fell by 2.0<"),
        ((-1.0, 5.0), "the margin is not distinguished from the start (+2.0)<"),
    )
    for (low, high), said in words:
        mean = 2.0 if high > 0 else -2.0
        moved = {**result["result"], "sets": {"held_out": {**held, "margin": {"mean": mean, "low": low, "high": high}}}}
        assert said in render(page({**result, "result": moved}))
    helps, _, rest = text.partition("What does no more than stopping DPO earlier?")
    assert "better than stopping DPO there" in helps and "stopping DPO there does as much" not in helps
    assert "What does not?" in rest and "<p>,<" not in text and "&lt;p&gt;" in text
    assert all(path.stat().st_size > 10_000 for path in figures(result, "small", tmp_path))


def test_arms_train_on_one_recipe_and_every_filter_has_its_controls():
    scale = SCALES["small"]
    names = [s.name for s in stages(scale)]
    assert names[-1] == f"arm/{scale.arms[-1]}/{scale.orders[-1]}" and len(names) == len(set(names))
    assert {name for name, one in ARMS.items() if one.control} == {"rejected_tokens", "random", "least_influence"}
    for config in SCALES.values():
        assert {"dpo", "influence", "random"} <= set(config.arms) <= set(ARMS)


@pytest.mark.slow
def test_a_tiny_run_ends_in_a_report_and_a_page(tmp_path):
    config = configure("story", "tiny", {"mesh": "data=1"})
    path = execute("story", "tiny", config, tmp_path / "run", resume=False, quiet=True)
    result = json.loads(path.read_text())
    assert set(result["result"]["arms"]) == set(config.arms)
    assert len(rows(result)) == 3 + len(config.arms)
    assert "ches diagnose" not in tables(result) and (tmp_path / "run" / "report.html").stat().st_size > 50_000
