"""Section 3: what is measured, on logs made by hand; scales; one run against the library's own numbers."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from ches_jax import bundled
from ches_jax.errors import DataError
from experiments import persona
from experiments.framework.item import Work
from experiments.persona import report, runs
from experiments.persona.config import PAPER_SEEDS, SCALES, YES_NO, Contest, Setting
from experiments.persona.data import STANCES, Statement, Words, draw, read_statements, stance_of, stance_of_word
from experiments.persona.runs import norms, stance_masses, top_gains
from experiments.persona.summary import contest_table, gains_over_runs, is_monotone, largest_decrease
from experiments.report import results as committed


def test_a_loss_that_rises_once_is_not_monotone():
    assert is_monotone([3.0, 2.0, 2.0, 1.0]) and not is_monotone([3.0, 2.0, 2.0 + 1e-12, 1.0])


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_decrease_is_that_of_all_ordered_pairs(seed):
    v = np.random.default_rng(seed).random(int(np.random.default_rng(seed + 99).integers(2, 30)))
    result = largest_decrease(v.tolist())
    assert result.size == max(v[t] - v[u] for t in range(len(v)) for u in range(t + 1, len(v)))
    assert result.start_step < result.end_step
    assert (v[result.start_step], v[result.end_step]) == (result.start, result.end)


def test_a_probability_that_only_rises_has_no_positive_decrease():
    assert largest_decrease([0.1, 0.2, 0.4]).size == pytest.approx(-0.1)


def test_top_gains_are_cumulative_and_may_be_negative():
    before, now = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.8, 0.1])
    assert [i for i, _ in top_gains(before, now, 3)] == [1, 2, 0]
    assert top_gains(before, now, 3)[2][1] == pytest.approx(-0.4)


def test_counts_of_a_cell_sum_to_three_per_run():
    rng = np.random.default_rng(0)
    runs = [[(str(i), float(g)) for i, g in top_gains(rng.random(9), rng.random(9), 3)] for _ in range(7)]
    cell = gains_over_runs(runs)
    assert sum(g.runs for g in cell) == 21
    assert Counter(t for run in runs for t, _ in run) == {g.token: g.runs for g in cell}
    first = cell[0]
    assert first.gain == pytest.approx(np.mean([v for run in runs for t, v in run if t == first.token]))
    assert [g.runs for g in cell] == sorted((g.runs for g in cell), reverse=True)


def test_norms_of_table_13_are_parts_of_the_difference():
    a, b = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    n = norms(a, b)
    assert n.projection**2 + n.orthogonal**2 == pytest.approx(n.difference**2, rel=1e-12)
    along = a.astype(np.float64) / np.linalg.norm(a.astype(np.float64))
    d = a.astype(np.float64) - b.astype(np.float64)
    assert n.projection == pytest.approx(d @ along, rel=1e-12)
    assert n.orthogonal == pytest.approx(np.linalg.norm(d - (d @ along) * along), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "stance"),
    [
        (" Yes", "agree"),
        ("yes", "agree"),
        ('"Yes', "agree"),
        ("NEVER", "disagree"),
        ("Maybe", "open"),
        ("Yesterday", "other"),
        ("", "other"),
        ("None", "other"),
    ],
)
def test_meaning_goes_by_letters(text, stance):
    assert stance_of(text, SCALES["paper"].words) == stance


def test_masses_are_the_whole_distribution():
    p = np.random.default_rng(0).dirichlet(np.ones(50)).astype(np.float32)
    stances = np.arange(50) % 4
    result = stance_masses(p, stances)
    assert sum(result.values()) == pytest.approx(1, abs=1e-6)
    assert result["open"] == pytest.approx(p[2::4].astype(np.float64).sum())


def log(losses, chosen, gains):
    masses = {name: [0.25 + 0.01 * i for i in range(len(chosen))] for name in STANCES}
    return {"losses": losses, "chosen": chosen, "rejected": chosen, "masses": masses, "gains": gains}


def test_only_runs_whose_loss_never_rose_are_counted():
    chosen = [0.5] * 6 + [0.1] * 95
    gains = {str(t): [("No", 0.2, "disagree"), ("a", 0.1, "other"), ("b", 0.0, "other")] for t in (5, 25, 100)}
    falling, rising = np.linspace(1, 0.5, 101).tolist(), [*np.linspace(1, 0.5, 100).tolist(), 0.6]
    setting = Setting("Table 1", "dpo", {}, 1e-6, True)
    table = contest_table(
        [log(falling, chosen, gains), log(rising, [0.9] * 101, gains)], YES_NO, setting, "agree", updates=100
    )
    assert (table["runs"], table["kept"], table["displaced"]) == (2, 1, 1)
    assert table["decrease"]["mean"] == pytest.approx(0.4)
    assert (table["from"]["mean"], table["to"]["mean"]) == (0.5, 0.1)
    assert table["gains"]["25"][0] == {"token": "No", "gain": 0.2, "runs": 1, "stance": "disagree"}
    assert table["opposite_gain"]["mean"] == pytest.approx(1.0)
    later = contest_table([log([*falling, 9.0], [*chosen, 0.0], gains)], YES_NO, setting, "agree", updates=100)
    assert later["kept"] == 1, "the loss after the last counted update is the last that counts"
    none = contest_table([log(rising, chosen, gains)], YES_NO, setting, "agree", updates=100)
    assert none["kept"] == 0 and none["decrease"] is None and none["gains"]["5"] == []


def test_the_paper_scale_is_the_papers():
    c = SCALES["paper"]
    assert c.seeds == PAPER_SEEDS and len(set(c.seeds)) == 10 and c.updates == 100
    assert c.template == "{question}\n" and c.prefix == ""
    assert c.contests_of_model() == (Contest("Yes", "No"), Contest("No", "Never"))
    llama = dataclasses.replace(c, model="meta-llama/Meta-Llama-3-8B")
    assert llama.contests_of_model() == (Contest("Yes", "No"), Contest("Sure", "Yes"))
    s = c.settings
    assert {k: (v.table, v.loss, dict(v.loss_args), v.lr, v.after_sft) for k, v in s.items()} == {
        "dpo-sft": ("Table 1", "dpo", {"beta": 0.1}, 1e-7, True),
        "dpo-base": ("Table 2", "dpo", {"beta": 0.1}, 1e-7, False),
        "ipo-sft": ("Table 3", "ipo_sum", {"tau": 0.01}, 1e-8, True),
    }
    assert (c.tuning.lr, c.tuning.batch_size, c.tuning.epochs) == (1e-7, 32, 1.0)
    assert c.labels["disagree"] == ("No", "Never", "Maybe", "Perhaps")
    names = [stage.name for stage in persona.stages(c)]
    assert len([n for n in names if n.startswith("single/")]) == 3 * 2 * 10


def test_statements_are_drawn_by_stance_and_seed():
    statements = [Statement(f"q{i}", "agree" if i % 3 else "disagree") for i in range(60)]
    drawn = [draw(statements, "disagree", seed) for seed in PAPER_SEEDS]
    assert drawn == [draw(statements, "disagree", seed) for seed in PAPER_SEEDS]
    assert all(statements[i].stance == "disagree" for i in drawn) and len(set(drawn)) > 3
    with pytest.raises(DataError, match="agree"):
        draw(statements[::3], "agree", 0)


def test_a_statement_that_accords_with_the_trait_is_to_be_denied(tmp_path):
    file = tmp_path / "s.jsonl"
    rows = [
        {"question": "a?", "answer_matching_behavior": " Yes"},
        {"question": "b?", "answer_matching_behavior": " No"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_statements(str(file)) == [Statement("a?", "disagree"), Statement("b?", "agree")]
    file.write_text('{"question": "a?"}')
    with pytest.raises(DataError, match="line 1: expected an object with question"):
        read_statements(str(file))


def test_the_bundled_statements_were_held_out():
    statements = read_statements("bundled")
    assert {s.stance for s in statements} == {"agree", "disagree"} and len(statements) > 100
    assert statements == read_statements("bundled")


def test_answer_words_are_one_token_each():
    c = SCALES["tiny"]
    words = Words(c, bundled.model_dir())
    assert words.text(words.word("Yes")) == "_Yes"
    with pytest.raises(DataError, match="expected one"):
        words.word("Yes and no")
    prompt = words.prompt(Statement('<|user|> Do you agree? "I would wait."<|assistant|>', "agree"))
    assert prompt[0] == words.tokenizer.bos_token_id and prompt[-1] != words.tokenizer.eos_token_id
    stances = words.stances(1300, c.words)
    assert len(stances) == 1300 and STANCES[stances[words.word("Never")]] == "disagree"
    assert STANCES[stances[1299]] == "other"


def test_every_model_of_every_contest_has_labels_for_it():
    for scale in SCALES.values():
        for contests in scale.contests.values():
            for contest in contests:
                assert stance_of_word(scale, contest.chosen) in ("agree", "disagree")
                assert any(contest.chosen in some for some in scale.labels.values())


def test_one_run_watches_the_distribution_that_the_loss_comes_from(tmp_path, tiny_model):
    config = dataclasses.replace(SCALES["tiny"], model=str(tiny_model), updates=2, mesh="data=1")
    work = Work("persona", "tiny", config, tmp_path, quiet=True)
    result = runs.single(work, dataclasses.replace(config.settings["dpo-base"], lr=1e-4), YES_NO, 9773)
    assert len(result["chosen"]) == 3 and len(result["losses"]) == 3
    ratio = np.log(np.array(result["chosen"]) / np.array(result["rejected"]))
    expected = np.logaddexp(0, -0.1 * (ratio - ratio[0]))
    np.testing.assert_allclose(result["losses"], expected, rtol=2e-5)
    assert ratio[2] > ratio[1] > ratio[0]
    assert sum(result["masses"][s][2] for s in STANCES) == pytest.approx(1, abs=1e-5)
    assert not list((tmp_path / "files" / "single").iterdir()), "weights of finished runs are thrown away"


@pytest.mark.parametrize(
    "name, result", [(name, result) for name, result in committed() if result["item"] == "persona"]
)
def test_committed_gains_count_three_tokens_of_every_kept_run(name, result):
    for contests in result["result"]["tables"].values():
        for v in contests.values():
            assert all(sum(g["runs"] for g in cell) == 3 * v["kept"] for cell in v["gains"].values())


def test_items_of_the_paper_are_counted_over_pairs_of_answers():
    gain = {"mean": 0.1, "low": 0.05, "high": 0.15}
    answers = {
        "a": {"displaced": 3, "kept": 4, "runs": 4, "opposite_gain": gain},
        "b": {"displaced": 2, "kept": 4, "runs": 4, "opposite_gain": {**gain, "low": 0.01}},
        "c": {"displaced": 1, "kept": 1, "runs": 4, "opposite_gain": {"mean": 0.0, "low": 0.0, "high": 0.01}},
    }
    directions = {"tuned": {"a": {"projection": -2.0, "orthogonal": 1.0}, "b": {"projection": 0.5, "orthogonal": 1.0}}}
    values = {"tables": {"dpo-sft": answers}, "directions": directions, "prompts": {"positive": 0.99}}
    by_table, gains = ["agree", "opposite", "undecided"], ["agree", "undecided", "opposite"]
    assert report.agreements(values) == [*by_table, *gains, "opposite", "agree", "opposite"]
