"""Every command of the documentation is run, page by page, in a folder with the files of a reader (slow)."""

import csv
import json
import shlex
import shutil
from itertools import islice
from pathlib import Path

import pytest

from ches_jax import bundled
from ches_jax.cli import main
from tests.helpers import write_lines
from tests.test_docs_run import PAGES, ROOT, commands_of

MODELS = ("M", "MODEL", "my-model", "my-sft-model")
PAIRS = ("pairs.jsonl", "train.jsonl")
HELD_OUT = ("held-out.jsonl", "test.jsonl")
STANDS_FOR = {"D": "pairs.jsonl", "FILE": "pairs.jsonl", "P": "held-out.jsonl", "200": "24"}
"""Words of a page that are no names of files, and a held-out set that the few pairs of the desk do not have."""
FINDINGS = ("doctor", "verify")
"""Verbs that end with 1 where they have something to say against the data, or a claim."""
EXTRA = {"pods.md": "plan compiles for a TPU: tests/plan"}
"""Pages whose commands need what a reader's machine may lack -> where they are run."""


def rows(first: int, count: int) -> list[dict]:
    with bundled.pairs_file().open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, first, first + count)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The files of a reader: models, an adapter, pairs with and without judgments, a trainer's output."""
    desk = tmp_path_factory.mktemp("desk")
    for name in MODELS:
        shutil.copytree(bundled.model_dir(), desk / name)  # a command may write beside it
    for name in PAIRS:
        write_lines(desk / name, rows(0, 48))
    for name in HELD_OUT:
        write_lines(desk / name, rows(216, 16))
    for i, row in enumerate(some := rows(0, 24)):
        row |= {"chosen_score": 3.0 + i % 3, "rejected_score": 2.0, "meta": {"judge": i / 24}}
    write_lines(desk / "judged.jsonl", some)
    singles = [
        {"prompt": r["prompt"], "completion": r[s], "label": s == "chosen"}
        for r in some
        for s in ("chosen", "rejected")
    ]
    write_lines(desk / "kto.jsonl", singles)
    with (desk / "votes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer", "thumbs_up"])
        table.writerows([one["prompt"], one["completion"], one["label"]] for one in singles)
    shutil.copytree(ROOT / "tests/displacement/logs/trl_dpo", desk / "trl-output")
    shutil.copytree(bundled.model_dir(), desk / "trl-output", dirs_exist_ok=True)  # the trained model, beside its log
    write_lines(desk / "few.jsonl", rows(0, 24))
    few = ["--model", str(desk / "M"), "--pairs", str(desk / "few.jsonl")]
    train = ["train", *few, "--batch-size", "8", "--lr", "1e-4"]
    lora = ["--lora-rank", "2", "--out", str(desk / "lora-run")]
    best = ["--holdout", "8", "--eval-every", "1", "--keep-best", "eval_loss:min", "--out", str(desk / "best-run")]
    assert main([*train, *lora]) == 0 and main([*train, *best]) == 0
    shutil.copytree(desk / "lora-run/adapter", desk / "my-lora")
    score = ["score", "--model", str(desk / "M"), "--pairs", str(desk / "judged.jsonl")]
    assert main([*score, "--out", str(desk / "scored")]) == 0
    return desk


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if commands_of(p.read_text("utf-8"))], ids=lambda p: p.name)
def test_the_commands_of_a_page_run(page, desk, tmp_path, monkeypatch, capsys):
    """One after the other, so that a later one finds what an earlier one wrote."""
    if page.name in EXTRA:
        pytest.skip(EXTRA[page.name])
    if page.name == "CHANGELOG.md":
        pytest.skip("history")
    work = tmp_path / "work"
    shutil.copytree(desk, work)
    (work / "tests").symlink_to(ROOT / "tests")
    (work / "runs").mkdir()
    shutil.copytree(desk / "scored", work / "runs/score-001")
    if page.name == "models.md":
        shutil.copytree(desk / "best-run", work / "runs/t")
    monkeypatch.chdir(work)
    for line in commands_of(page.read_text(encoding="utf-8")):
        words = [STANDS_FOR.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        said = main(words), capsys.readouterr().err[-2000:]
        assert said[0] in ((0, 1) if words[0] in FINDINGS else (0,)), f"{line}\n{said[1]}"
