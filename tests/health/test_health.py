"""Data health without a model: each check on rows made for it, thresholds on both sides, and the command."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ches_jax.cli import main
from ches_jax.data.duplicates import NEAR, NearDuplicates, jaccard, normalised, shingles
from ches_jax.data.sources import open_pairs
from ches_jax.health import checks
from ches_jax.health.checks import Row
from ches_jax.health.examine import WHAT_TO_DO, Health, examine
from ches_jax.languages import language

WORDS = [
    "north",
    "south",
    "east",
    "west",
    "river",
    "hill",
    "stone",
    "bridge",
    "house",
    "garden",
    "apple",
    "plum",
    "pear",
    "cherry",
    "wind",
    "rain",
    "snow",
    "sun",
]
RNG = np.random.default_rng(0)


def text(n: int = 30) -> str:
    return " ".join(RNG.choice(WORDS, n))


def row(name: str = "line 1", **parts: Any) -> Row:
    return Row(**{"name": name, "prompt": text(12), "chosen": text(), "rejected": text(), "extra": {}, **parts})


def rows(n: int) -> list[Row]:
    return [row(f"line {i}") for i in range(n)]


def test_cohens_d_is_the_difference_in_pooled_standard_deviations():
    a, b = RNG.normal(3, 2, 50), RNG.normal(1, 3, 50)
    pooled = (((a - a.mean()) ** 2).sum() / 49 + ((b - b.mean()) ** 2).sum() / 49) / 2
    assert checks.cohens_d(a, b) == pytest.approx((a.mean() - b.mean()) / pooled**0.5, rel=1e-12)
    assert checks.cohens_d(a, b) == -checks.cohens_d(b, a)


def test_length_is_a_finding_from_a_medium_effect_on_whichever_side():
    base = rows(60)
    assert not checks.length(base).finding
    longer = [row(r.name, chosen=r.chosen + " " + text(20)) for r in base]
    shorter = [row(r.name, rejected=r.rejected + " " + text(20)) for r in base]
    more, less = checks.length(longer), checks.length(shorter)
    assert more.finding and more.numbers["cohens_d"] > checks.EFFECT
    assert less.finding and less.numbers["cohens_d"] < -checks.EFFECT
    low, high = more.numbers["interval"]
    assert 0 < low < more.numbers["cohens_d"] < high


def test_pairs_of_one_prompt_are_one_draw():
    """Sixty copies of two prompts tell no more than two rows do: the interval is wide."""
    apart = [row(f"line {i}", chosen=text(36)) for i in range(60)]
    together = [row(r.name, prompt=str(i % 2), chosen=r.chosen, rejected=r.rejected) for i, r in enumerate(apart)]
    width = {k: np.ptp(checks.length(v).numbers["interval"]) for k, v in {"a": apart, "t": together}.items()}
    assert width["a"] > 0 and width["t"] != width["a"]


def test_refusals_by_side():
    no = "I'm sorry, but I can't help with that."
    result = checks.refusals([*rows(20), *(row(f"no {i}", rejected=no) for i in range(20))])
    assert result.finding and result.numbers["rejected"] == 0.5 and result.numbers["chosen"] == 0
    assert result.rows == 20 and result.examples[0] == "no 0"
    assert not checks.refusals([row(f"both {i}", chosen=no, rejected=no) for i in range(20)]).finding


def test_identical_empty_and_contradictory_rows():
    a = row("a", prompt="p q r", chosen="Yes, it is.", rejected="No, never.")
    same = row("b", chosen="x y", rejected=" x y ")
    bare = row("c", rejected="  ")
    turned = row("d", prompt="P, q r", chosen="no never", rejected="yes it is!")
    all_rows = [a, same, bare, turned]
    assert checks.identical(all_rows).examples == ["b"]
    assert checks.empty(all_rows).examples == ["c (rejected)"]
    result = checks.contradictions(all_rows)
    assert result.finding and result.examples == ["d against a"]
    assert not checks.contradictions([a, a, same, same]).finding  # a repeated row does not contradict itself


def test_duplicates_are_a_finding_from_one_percent():
    base = rows(99)
    again = row("again", prompt=base[3].prompt.upper(), chosen=base[3].chosen + "!", rejected=base[3].rejected)
    near = row("near", prompt=base[5].prompt, chosen=base[5].chosen + " today", rejected=base[5].rejected)
    other_side = row("other", prompt=base[7].prompt, chosen=base[7].chosen, rejected=text())
    result = checks.duplicates([*base, again])
    assert result.finding and result.examples == ["again repeats line 3"]
    assert checks.duplicates([*base, near]).examples == ["near is nearly line 5"]
    # pairs of one row have one name
    assert checks.duplicates([row(r.name.replace("line 1", "line 2"), prompt=r.prompt) for r in base]).rows == 0
    # the same prompt with another rejected response is another pair
    assert checks.duplicates([*base, other_side]).rows == 0
    assert not checks.duplicates([*base, *rows(2), again]).finding


def test_near_duplicates_are_those_of_a_full_comparison_away_from_the_threshold():
    texts = [text(40) for _ in range(20)]
    changed = [" ".join(w if RNG.random() > 0.03 else "changed" for w in t.split()) for t in texts]
    drawn = random.getstate()
    seen = NearDuplicates()
    assert random.getstate() == drawn, "the generator is its user's"
    for i, t in enumerate(texts):
        assert seen.first_like(str(i), t) is None
    for i, t in enumerate(changed):
        similarity = jaccard(shingles(texts[i]), shingles(t))
        if abs(similarity - NEAR) > 0.05:
            assert seen.like(t) == (str(i) if similarity > NEAR else None)
    assert normalised("Ａ  Cat\u2014DOG") == "a cat dog"


def test_a_row_is_a_near_duplicate_only_where_each_of_its_texts_is():
    seen, prompt = NearDuplicates(), text(200)
    assert seen.first_like("a", prompt, "the answer is a red apple") is None
    assert seen.like(prompt, "the answer is a red apple") == "a"
    assert seen.like(prompt, "no idea what you want to hear") is None


def test_scores_against_the_label_with_ranks_the_other_way():
    extra = [
        {"score_chosen": 5, "score_rejected": 3},
        {"score_chosen": "2", "score_rejected": "4.5"},
        {"score_chosen": 1, "score_rejected": 1},
        {"score_chosen": None, "score_rejected": 1},
    ]
    result = checks.scores([row(f"r{i}", extra=e) for i, e in enumerate(extra)])
    assert result.finding and result.examples == ["r1 (score_chosen 2, score_rejected 4.5)"]
    assert result.numbers["score_chosen"] == {"other": "score_rejected", "rows": 3, "against": 1, "equal": 1}
    ranks = [{"rank_chosen": 1, "rank_rejected": 2}, {"rank_chosen": 3, "rank_rejected": 2}]
    assert checks.scores([row(f"r{i}", extra=e) for i, e in enumerate(ranks)]).examples == [
        "r1 (rank_chosen 3, rank_rejected 2)"
    ]
    assert not checks.scores(rows(3)).finding


def test_leaks_are_equal_or_nearly_equal_prompts():
    base = rows(5)
    near = row("near", prompt=base[1].prompt + " soon")
    result = checks.leaks([*base, near], [text(12), base[2].prompt.title(), base[1].prompt], "test.jsonl")
    assert result.finding and result.numbers == {"exact": 2, "near": 1}
    assert result.examples[-1] == "near is nearly row 2 of test.jsonl"
    assert not checks.leaks(base, [text(12)], "test.jsonl").finding


def test_languages_that_differ_between_the_sides():
    german, english = "Das ist nicht der Weg, den ich dir zeigen kann.", "This is not the way that I can show you."
    result = checks.languages([row("r0", chosen=german, rejected=english), row("r1", chosen=english, rejected=english)])
    assert result.finding and result.examples == ["r0 (chosen de, rejected en)"]
    assert result.numbers["chosen"] == {"de": 1, "en": 1}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("It is the same as the one that you have.", "en"),
        ("C'est la même chose que dans le livre.", "fr"),
        ("Es la misma cosa que en el libro.", "es"),
        ("È la stessa cosa che è nel libro.", "it"),
        ("Não é a mesma coisa que você tem.", "pt"),
        ("Dat is niet het boek dat ik heb.", "nl"),
        ("To nie jest to samo co na stole.", "pl"),
        ("これは本です。", "ja"),
        ("这是一本书。", "zh"),
        ("이것은 책입니다.", "ko"),
        ("Это книга.", "ru"),
        ("هذا كتاب", "ar"),
        ("यह एक किताब है", "hi"),
        ("x = f(y) + 3", "und"),
        ("", "und"),
    ],
)
def test_a_language_is_recognised_by_letters_and_function_words(words: str, code: str):
    assert language(words) == code


def test_every_finding_says_what_to_do():
    base = rows(4)
    names = {check(base).name for check in checks.CHECKS} | {"unreadable", "leaked prompts", "labels"}
    assert names == set(WHAT_TO_DO)
    bad = checks.identical([*base, row("line 9", chosen="a", rejected="a"), row("line 10", chosen="b", rejected="b")])
    assert Health("f", 6, [bad, checks.empty(base)]).text().splitlines()[2:] == [
        "FINDING  identical sides 2 pairs with two equal responses",
        f"{'':25}such as line 9",
        f"{'':33}line 10",
        f"{'':25}do: {WHAT_TO_DO['identical sides']}",
        "ok       empty texts     0 rows with an empty text",
    ]


def write(path: Path, data: list[Row]) -> str:
    path.write_text(
        "".join(json.dumps({"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected}) + "\n" for r in data)
    )
    return str(path)


def test_the_command_examines_pairs_without_a_model(tmp_path: Path, capsys: Any):
    base = rows(20)
    good = write(tmp_path / "good.jsonl", base)
    assert main(["doctor", "--pairs", good]) == 0
    out = capsys.readouterr()
    assert "FINDING" not in out.out and "20 rows, 0 findings" in out.err
    bad = write(tmp_path / "bad.jsonl", [*base, row(chosen=""), row(chosen="Yes.", rejected="Yes.")])
    assert main(["doctor", "--pairs", bad, "--against", good, "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["exit_code"] == 1 and record["counts"] == {"rows": 22, "findings": 3} and not record["healthy"]
    findings = {name: check["rows"] for name, check in record["checks"].items() if check["finding"]}
    assert findings == {"identical sides": 1, "empty texts": 1, "leaked prompts": 20}
    assert record["checks"]["empty texts"]["examples"] == ["line 21 (chosen)"]
    assert main(["doctor", "--pairs", str(tmp_path / "none.jsonl")]) == 2
    assert main(["doctor", "--model", "bundled", "--pairs", good, "--against", bad]) == 2
    assert "leave out --model" in capsys.readouterr().err


@pytest.mark.slow
def test_no_model_means_no_jax_and_no_transformers(tmp_path: Path):
    good = write(tmp_path / "good.jsonl", rows(5))
    code = f"from ches_jax.doctor import *; doctor(DoctorConfig(pairs={good!r})); import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "transformers", "torch"} & set(loaded)


def test_rows_beyond_every_context_and_rows_that_cannot_be_read_are_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "p", "chosen": "yes", "rejected": "no"}
    rows = [good, {**good, "prompt": "x" * 99_997}, {**good, "prompt": "x" * 99_998}, {**good, "rejected": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    health = examine(open_pairs(str(path))).to_json()
    assert health["checks"]["prompt_too_long"]["examples"] == ["line 3 (100,001 characters)"]
    assert health["checks"]["unreadable"]["rows"] == 1
    assert "line 4" in health["checks"]["unreadable"]["examples"][0]
    assert not health["healthy"]
