"""Reads inputs of a harness one after another; whatever is no refusal in words is a finding.

    python -m tests.fuzz.run HARNESS FIRST COUNT

An input follows from its number alone. Each has ten seconds of processor time, a hundred of the clock (what waits uses
no processor), and two gigabytes of memory beyond what the process had at its start: the process dies of more, and its
father (``findings``) counts from the number where it died.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from random import Random

SECONDS = 10
MEMORY = 2 * 2**30


def attempt(name: str, number: int, folder: Path) -> str | None:
    """What is wrong with how one input is read; None where it is read, or refused in words."""
    from tests.fuzz.inputs import HARNESSES, REFUSED

    folder.mkdir()
    before = Path.cwd()
    try:
        read = HARNESSES[name](Random(f"{name} {number}"), folder)
        os.chdir(folder)
        read()
    except REFUSED as refusal:
        return None if str(refusal).strip() else "an empty message"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        inside = [f for f in where if "ches_jax" in f.filename and "tests" not in f.filename] or where
        frame = inside[-1]
        return (
            f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno} ({frame.name}): {str(error)[:150]!r}"
        )
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
    return None


def findings(name: str, first: int, count: int, most: int = 200) -> list[tuple[int, str]]:
    """Numbers of the inputs from ``first`` on that are neither read nor refused in words, and what happened instead."""
    found: list[tuple[int, str]] = []
    number, end = first, first + count
    while number < end and len(found) < most:
        with tempfile.TemporaryFile() as errors:
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzz.run", name, str(number), str(end - number)],
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=Path(__file__).parents[2],
                check=False,
            )
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace")[-2000:]
        lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
        found += [(n, what) for n, what in lines if what]
        number = max((n for n, _ in lines), default=number - 1) + 1
        if done.returncode:
            try:
                how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
            except ValueError:
                how = f"exit code {done.returncode}"
            found.append((number, f"the process ended with {how}: {said[-300:]!r}"))
            number += 1
    return found


def main(name: str, first: int, count: int) -> None:
    """Attempts in this process, a line on standard output each."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for number in range(first, first + count):
            if number == first + 1:  # everything is imported
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.setitimer(signal.ITIMER_PROF, SECONDS if number > first else 60)
            signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS if number > first else 600)
            what = attempt(name, number, Path(place) / "case")
            for clock in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                signal.setitimer(clock, 0)
            answers.write(json.dumps([number, what]) + "\n")
            answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
