"""Recipes: what a file means, what it refuses, and that nothing is made twice."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ches_jax.cli.recipe import RECORD, read_recipe, run_recipe, steps_of
from ches_jax.errors import ChesError

VERBS = ("generate", "train", "diagnose")
TWO_ROUNDS = """
rounds = 2
[first]
"b/model" = "bundled"
[[stage]]
name = "a"
verb = "generate"
options = { model = "{b/model}", samples = 2, relabel = true, stop = ["x", "y"] }
[[stage]]
name = "b"
verb = "train"
options = { pairs = "{a/pairs.jsonl}", loss_args = { beta = 0.3 } }
[[stage]]
name = "c"
verb = "diagnose"
path = "{b}"
"""


def written(tmp_path, text):
    file = tmp_path / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_stage_takes_what_this_round_made_or_the_round_before(tmp_path):
    steps = steps_of(read_recipe(written(tmp_path, TWO_ROUNDS), VERBS), Path("o"))
    assert [step.key for step in steps] == ["1-a", "1-b", "1-c", "2-a", "2-b", "2-c"]
    flags = ("--samples", "2", "--relabel", "--stop", "x", "y", "--out")
    assert steps[0].words == ("--model", "bundled", *flags, "o/1-a")
    assert steps[1].words == ("--pairs", "o/1-a/pairs.jsonl", "--loss-args", "beta=0.3", "--out", "o/1-b")
    assert steps[2].words == ("o/1-b", "--out", "o/1-c")
    assert steps[3].words == ("--model", "o/1-b/model", *flags, "o/2-a")
    assert steps[4].words[1] == "o/2-a/pairs.jsonl"


def test_doubled_braces_are_braces_of_the_value(tmp_path):
    text = TWO_ROUNDS.replace("samples = 2", 'goal = "{{reward:.2f}} of {b/model}", better = "{{prompt}}"')
    assert steps_of(read_recipe(written(tmp_path, text), VERBS), Path("o"))[0].words[2:6] == (
        "--goal",
        "{reward:.2f} of bundled",
        "--better",
        "{prompt}",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds =", "is no TOML"),
        ("", "no .*stage"),
        ("round = 1\n" + TWO_ROUNDS, "round: a recipe has rounds"),
        (TWO_ROUNDS.replace("rounds = 2", "rounds = 0"), "a whole number from 1 to 100"),
        (TWO_ROUNDS.replace('verb = "train"', 'verb = "trian"'), "stage 2 .b.: no verb 'trian'; did you mean train"),
        (TWO_ROUNDS.replace('name = "b"', 'name = "a"'), "a second stage is named 'a'"),
        (TWO_ROUNDS.replace('"{b/model}"', '"{d/model}"'), "stage a: {d/model} is no stage"),
        (TWO_ROUNDS.replace('"b/model" =', '"b/other" ='), "{b/model} has not run yet in the first round"),
        (TWO_ROUNDS.replace("samples = 2", 'out = "x"'), "without out"),
    ],
)
def test_recipes_that_are_none(tmp_path, text, message):
    with pytest.raises(ChesError, match=message):
        read_recipe(written(tmp_path, text), VERBS)


def test_a_stopped_recipe_goes_on_and_makes_nothing_twice(tmp_path):
    file, out, ran = written(tmp_path, TWO_ROUNDS), tmp_path / "out", []

    def command(verb, words):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((verb, words[-1]))
        return SimpleNamespace(code=0, headline="made")

    def run(resume):
        return run_recipe(file, out, command, VERBS, resume=resume, say=lambda text: None)

    with pytest.raises(KeyboardInterrupt):
        run(resume=False)
    with pytest.raises(ChesError, match="add --resume"):
        run(resume=False)
    before, ran[:] = list(ran), ["on"] * 3
    record = run(resume=True)
    after = ran[3:]
    assert [Path(o).name for _, o in before + after] == ["1-a", "1-b", "1-c", "2-a", "2-b", "2-c"]
    assert list(record["done"]) == [Path(o).name for _, o in before + after] and record["stages"] == 6
    assert json.loads((out / RECORD).read_text())["done"]["1-a"]["words"][0] == "generate"
    file.write_text(TWO_ROUNDS.replace("samples = 2", "samples = 3"), encoding="utf-8")
    with pytest.raises(ChesError, match="1-a: was made by another command"):
        run(resume=True)


def test_a_stage_that_fails_stops_the_recipe(tmp_path):
    def failing(verb, words):
        return SimpleNamespace(code=1, headline="not healthy")

    with pytest.raises(ChesError, match=r"stage 1-a: not healthy \(exit code 1\)"):
        run_recipe(written(tmp_path, TWO_ROUNDS), tmp_path / "o", failing, VERBS, resume=False, say=lambda text: None)


def test_the_recipes_that_ship_are_recipes():
    from ches_jax.cli.commands import COMMANDS
    from ches_jax.cli.suggest import corrected

    files = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.toml"))
    assert len(files) == 5
    for file in files:
        for step in steps_of(read_recipe(file, tuple(COMMANDS)), Path("o")):
            corrected(step.verb, COMMANDS[step.verb], step.words)


@pytest.mark.parametrize("record", [{}, {"done": 3}, {"done": {"1-a": {"words": "ches"}}}, {"done": {"1-a": None}}, []])
def test_a_damaged_record_of_stages_is_told(tmp_path, record):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD).write_text(json.dumps(record))
    with pytest.raises(ChesError, match=f"{RECORD}: "):
        run_recipe(
            written(tmp_path, TWO_ROUNDS), tmp_path / "out", lambda *_: None, VERBS, resume=True, say=lambda _: None
        )


def rows_of(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def goals(run):
    """Two rows of each pair, which ask for different rewards and have each other's responses."""
    rows = rows_of(run / "1-goals")
    assert rows
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert one["prompt"] != other["prompt"] and one["prompt"].startswith("(score: ")
        assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])


def curriculum(run):
    """Every pair is easy or hard, and all easy ones have a larger gap."""
    parts = [rows_of(run / f"1-{part}") for part in ("easy", "hard")]
    gaps = [[row["chosen_reward"] - row["rejected_reward"] for row in part] for part in parts]
    assert [len(part) for part in gaps] == [16, 16] and min(gaps[0]) >= max(gaps[1]) > -1 and max(gaps[0]) > 0


def filtered_dpo(run):
    """What is left is what no text beats."""
    against = rows_of(run / "1-rewards")
    beaten = {row["pair"] for row in against if row["rejected_reward"] > row["chosen_reward"]}
    assert against and len(rows_of(run / "1-kept")) == len(rows_of(run / "1-pairs")) - len(beaten)


def d2o(run):
    """The policy's own samples stand beside each rejected response."""
    assert all(len(row["responses"]) == 3 and row["rejected"] for row in rows_of(run / "1-rows"))


def iterative_dpo(run):
    """The second round samples from what the first one trained, and no label is less likely than not."""
    assert "1-train" in json.loads((run / "2-samples" / "config.json").read_text())["config"]["model"]
    assert all(row["label_probability"] >= 0.5 for row in rows_of(run / "2-labels"))


@pytest.mark.slow
@pytest.mark.parametrize("holds", [goals, curriculum, filtered_dpo, d2o, iterative_dpo], ids=lambda f: f.__name__)
def test_a_recipe_runs_on_the_bundled_world(tmp_path, monkeypatch, holds):
    """And makes nothing again when it is resumed."""
    from ches_jax.cli import main

    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[1] / "examples" / "recipes" / f"{holds.__name__}.toml"
    assert main(["recipe", str(file), "--out", "run", "--quiet"]) == 0
    holds(tmp_path / "run")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != RECORD}
    assert main(["recipe", str(file), "--out", "run", "--quiet", "--resume"]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != RECORD}
