"""Each file of an unfinished run is replaced by something else, and the run resumed: refused, or the same bytes.

    python -m tests.crash.replace_files VERB MODEL [--kinds pipe device ...]

As ``enumerate_kills``, of which this has the commands: the run is killed before its ``run.json`` is there. One line of
JSON at the end: how many files were replaced, and what went wrong with which.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ches_jax.train.saved_here import UNREADABLE
from tests.crash.enumerate_kills import Refused, command, content, different, prepared, run, verbs

ELSEWHERE = "somebody's own"
KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
    "nothing": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(b"\x00\xff{[" * 50),
    "link": lambda path: path.symlink_to(Path("elsewhere.txt").absolute()),
}
"""What lies in the place of a file."""


def main(verb: str, model: str, kinds: Sequence[str]) -> None:
    """Replace every file of one command's run in turn."""
    with tempfile.TemporaryDirectory(prefix="replaced-") as place:
        plan = verbs(model)[verb]
        start = prepared(Path(place), plan)
        tried, problems = replaced(start, plan["words"], [*plan["words"], *plan["again"]], kinds)
    print(json.dumps({"replaced": tried, "problems": problems}))


def replaced(start: Path, words: list[str], again: list[str], kinds: Sequence[str]) -> tuple[int, list[str]]:
    """How many files were replaced, and the problems."""
    whole, unfinished = start.parent / "whole", start.parent / "unfinished"
    for folder in (whole, unfinished):
        shutil.copytree(start, folder)
    operations = run(whole, command(words))
    expected = content(whole)
    run(unfinished, command(words), max(i for i, o in enumerate(operations) if o.startswith("os.rename out/.run.json")))
    files = [path.relative_to(unfinished) for path in sorted((unfinished / "out").rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix != ".tmp"]
    problems = []
    for file in files:
        for kind in kinds:
            case = start.parent / "case" / "here"
            shutil.copytree(unfinished, case)
            if problem := _problem(case, case / file, kind, again, expected):
                problems.append(f"{file}, {kind}: {problem}")
            shutil.rmtree(case.parent)
    return len(files) * len(kinds), problems


def _problem(case: Path, file: Path, kind: str, again: list[str], expected: dict) -> str | None:
    elsewhere = case.parent / "elsewhere.txt"
    elsewhere.write_text(ELSEWHERE)
    file.unlink()
    before = Path.cwd()
    os.chdir(case.parent)
    try:
        KINDS[kind](file)
    finally:
        os.chdir(before)
    try:
        run(case, command(again))
    except Refused as refusal:
        said = str(refusal)
        if not said.startswith("exit code 2: ") or "Traceback" in said:
            return said
    else:
        found = {name: value for name, value in content(case).items() if UNREADABLE not in name}
        if problem := different(expected, found):
            return problem
    return None if elsewhere.read_text() == ELSEWHERE else "a file elsewhere was written"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=[verb for verb, plan in verbs("MODEL").items() if "again" in plan])
    parser.add_argument("model")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    main(options.verb, options.model, options.kinds)
