"""A command is killed before each of its operations on files in turn, and started again: the same bytes, no leftovers.

    python -m tests.crash.enumerate_kills VERB MODEL [--jobs N] [--most N] [--record tests/crash/counts.json]

This process imports everything and computes nothing, so that it may fork: each run is a child, which neither imports
nor (with the compilation cache) compiles much. One line of JSON at the end: the operations, and what went wrong after
which.
"""

import argparse
import contextlib
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ches_jax.data.tokenize import load_tokenizer
from tests.crash.device import without_device
from tests.crash.killer import Killer

IMPORTED = (
    "jax",
    "jax.numpy",
    "flax.nnx",
    "optax",
    "orbax.checkpoint",
    "transformers",
    "datasets",
    "pyarrow.parquet",
    "scipy.stats",
    "ches_jax.cli.commands",
    "ches_jax.scores.run",
    "ches_jax.generate.run",
    "ches_jax.generate.engine",
    "ches_jax.judges.run",
    "ches_jax.select.run",
    "ches_jax.report.page",
    "ches_jax.report.score_page",
    "ches_jax.convert",
    "ches_jax.train.loop",
    "ches_jax.train.restore",
    "ches_jax.models.checkpoint.save",
    "ches_jax.scores.in_memory",
    "ches_jax.displacement.diagnose",
    "ches_jax.report.diagnosis_page",
    "ches_jax.train.observe.eval_loss",
    "ches_jax.forecast.run",
)
OF_THE_MOMENT = {
    "seconds",
    "pairs_per_second",
    "tokens_per_second",
    "scored_this_time",
    "updates_this_time",
    "compiled_shapes",
    "padding_waste",
    "work",
}
"""What ``run.json`` tells of the process that ended the run."""
SECONDS = 600
"""After which a run hangs; of the clock, on a busy machine."""
ROW = {"prompt": "Tell me of {}.", "chosen": " It is a fine day, {}.", "rejected": " No.", "category": "c"}
SMALL = ["--limit", "5", "--quiet"]


def verbs(model: str) -> dict[str, dict[str, Any]]:
    """For each command its words, how it is started again, and the runs that it reads."""
    pairs = ["--model", model, "--pairs", "pairs.jsonl"]
    score = [
        "score",
        *pairs,
        "--chunk-rows",
        "3",
        "--on-bad-row",
        "drop",
        "--token-scores",
        "--logps",
        *SMALL,
        "--out",
        "out",
    ]
    made = [*score[:-1], "scores"]
    small = ["--batch-size", "2", "--steps", "2", "--holdout", "1", "--mesh", "data=1", "--lr", "1e-4"]
    train = ["train", *pairs, *small, "--save-every", "1", "--on-bad-row", "drop", *SMALL]
    generate = [
        "generate",
        "--model",
        model,
        "--prompts",
        "pairs.jsonl",
        "--chunk-rows",
        "2",
        "--batch-size",
        "2",
        "--max-new-tokens",
        "3",
        *SMALL,
    ]
    judge = ["judge", "--responses", "texts", "--chunk-rows", "2", "--quiet", "--out", "out"]
    return {
        "score": {"words": score, "again": ["--resume"]},
        "generate": {"words": [*generate, "--out", "out"], "again": ["--resume"]},
        "judge": {"before": [[*generate, "--out", "texts"]], "words": judge, "again": ["--resume"]},
        "select": {
            "before": [made],
            "words": ["select", "--scores", "scores", "--by", "ches", "--keep", "lowest:0.5", "--out", "out"],
        },
        "report": {"before": [made], "words": ["report", "scores"]},
        "convert": {"words": ["convert", "--model", model, "--shard-gb", "0.00002", "--out", "out"]},
        "convert a checkpoint": {
            "before": [[*train, "--no-export", "--out", "run"]],
            "words": ["convert", "--run", "run", "--out", "out"],
        },
        "train": {"words": [*train, "--out", "out"], "again": ["--resume"]},
        "train adapters": {"words": [*train, "--lora-rank", "2", "--out", "out"], "again": ["--resume"]},
        "diagnose": {
            "before": [made],
            "words": ["diagnose", "--before", "scores", "--after", "scores", "--out", "out"],
        },
    }


class Refused(Exception):
    """A command ended with another code than 0."""


def command(words: list[str]) -> Callable[[], int]:
    """A command line as what a child does."""

    def act() -> int:
        from ches_jax.cli import main

        sys.argv = ["ches", *words]
        with without_device() if words[0] in ("score", "generate", "train") else contextlib.nullcontext():
            return main(words)

    return act


def run(folder: Path, act: Callable[[], int], at: int | None = None) -> list[str]:
    """What a child does in a folder until it dies before operation ``at``; returns the operations that it did.

    Raises:
      Refused: it ended with another code than 0, and not by the kill.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        code = 1
        try:
            os.chdir(folder)
            signal.alarm(SECONDS)
            said = os.open("../said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            killer = Killer(folder, at)
            killer.install()
            code = act()
            os.write(write, json.dumps(killer.seen).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as answer:
        seen = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise Refused(f"exit code {status}: {(folder.parent / 'said.txt').read_text()[-500:]}")
    return json.loads(seen or "[]")


def content(folder: Path) -> dict[str, Any]:
    """What lies below a folder: bytes by name; of checkpoints the names of what is whole."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        inside = name.partition("checkpoints/")[2]
        if inside:  # orbax writes times; what the arrays hold is in the exported weights
            if inside.count("/") == 0:
                found[name] = "a checkpoint"
        elif path.name == "run.json":
            value = json.loads(path.read_text())
            found[name] = {k: v for k, v in value.items() if k not in OF_THE_MOMENT}
        else:
            found[name] = path.read_bytes() if path.is_file() else "a folder"
    return found


def different(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """What two contents differ in; of two ``run.json`` what both tell."""
    if left := sorted(found.keys() - expected.keys()):
        return f"left over: {left}"
    if missing := sorted(expected.keys() - found.keys()):
        return f"missing: {missing}"
    for name, value in expected.items():
        other = found[name]
        if isinstance(value, dict):
            keys = [k for k in value if k in other and value[k] != other[k]]
            if keys:
                return f"{name}: {[(k, value[k], other[k]) for k in keys]}"[:500]
        elif value != other:
            return f"{name} has other bytes"
    return None


def main(verb: str, model: str, most: int | None = None, record: Path | None = None, jobs: int = 1) -> None:
    """Enumerate the kills of one command, and note the counts in a file."""
    code = commit()
    with tempfile.TemporaryDirectory(prefix="crash-") as place:
        plan = verbs(model)[verb]
        start = prepared(Path(place), plan)
        again = command([*plan["words"], *plan.get("again", ())])
        operations, problems = enumerated(start, command(plan["words"]), again, "again" not in plan, most, jobs)
    print(json.dumps({"operations": operations, "problems": problems}))
    if record is not None:
        killed = len(operations[:most])
        counts = {"operations": len(operations), "killed_before": killed, "problems": len(problems), "commit": code}
        note(record, verb, counts)


def prepared(place: Path, plan: dict[str, Any]) -> Path:
    """Everything is imported, and a folder holds what a command reads."""
    for name in IMPORTED:
        importlib.import_module(name)
    load_tokenizer("bundled")  # transformers imports the rest then
    start = place / "start"
    start.mkdir()
    rows = [{k: v.format(n) for k, v in ROW.items()} for n in ("bread", "rain", "wood", "song")]
    rows.insert(1, {"prompt": "Bad.", "chosen": " same", "rejected": " same"})
    (start / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in plan.get("before", ()):
        run(start, command(words))
    return start


def commit() -> str:
    """The commit of the code that runs; with a word where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ":/ches_jax", ":/tests/crash/*.py")
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")


def note(record: Path, verb: str, counts: dict[str, Any]) -> None:
    """Puts the counts of a command beside those of the others; several processes may do so at once."""
    with record.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = json.loads(file.read() or "{}") | {verb: counts}
        file.truncate(0)
        file.write(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def enumerated(
    start: Path,
    act: Callable[[], int],
    again: Callable[[], int],
    at_once: bool = False,
    most: int | None = None,
    jobs: int = 1,
) -> tuple[list[str], list[str]]:
    """Kills before every operation in turn.

    Args:
      start: the folder as it is before; copies are made beside it.
      act: what is killed.
      again: what is done afterwards, until its end.
      at_once: what it makes is there whole or not at all: where it is there, doing it again is refused.
      most: only so many operations.
      jobs: kills at once; each has a folder of its own.

    Returns:
      The operations of a run that nobody kills, and what went wrong after which.
    """
    whole = start.parent / "whole"
    shutil.copytree(start, whole)
    operations = run(whole, act)
    expected = content(whole)

    def problem_of(at: int) -> str | None:
        folder = start.parent / f"case{at}" / "here"
        shutil.copytree(start, folder)
        try:
            run(folder, act, at)
            try:
                run(folder, again)
            except Refused as refusal:
                if not at_once or "exists and is not an empty directory" not in str(refusal):
                    raise
            return different(expected, content(folder))
        except Refused as refusal:
            return str(refusal)
        finally:
            shutil.rmtree(folder.parent)

    with ThreadPoolExecutor(jobs) as several:
        found = list(several.map(problem_of, range(len(operations[:most]))))
    problems = [f"{at} {operations[at]}: {problem}" for at, problem in enumerate(found) if problem]
    return operations, problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=list(verbs("MODEL")))
    parser.add_argument("model")
    parser.add_argument("--most", type=int, help="only so many operations")
    parser.add_argument("--jobs", type=int, default=1, help="kills at once")
    parser.add_argument("--record", type=Path, help="where the counts are noted")
    options = parser.parse_args()
    with contextlib.suppress(BrokenPipeError):
        main(options.verb, options.model, options.most, options.record, options.jobs)
