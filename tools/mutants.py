"""Small plausible mistakes, one after another, against the tests of their area: which of them does no test notice?

    python tools/mutants.py [--area AREA ...] [--from N]

The list is ``mutants.toml``. Each mistake is made in a copy of the tree, and fast tests of its area run until one
fails. What survives is printed; the exit code is 1 where more than one in twenty does.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")
SECONDS = 1800
"""After which a mistake counts as noticed: the tests hang."""


@dataclass(frozen=True)
class Mutant:
    """A mistake."""

    area: str
    file: str
    old: str
    new: str
    breaks: str
    """What it would break, in words."""
    occurs: int = 1
    """How often the old text is there; every place is changed."""

    def __str__(self) -> str:
        return f"{self.area}, {self.file}: {self.breaks}"

    def made_in(self, text: str) -> str:
        """The text of the file with the mistake.

        Raises:
          ValueError: the old text is not there as often as it should be.
        """
        if text.count(self.old) != self.occurs:
            raise ValueError(f"{self}: its text is there {text.count(self.old)} times, expected {self.occurs}")
        return text.replace(self.old, self.new)


def mutants() -> tuple[list[Mutant], dict[str, list[str]]]:
    """The list, and the tests of each area."""
    read = tomllib.loads(LIST.read_text(encoding="utf-8"))
    return [Mutant(**mutant) for mutant in read["mutant"]], read["tests"]


def copy_of_tree(folder: Path) -> None:
    """The tracked files of the working tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def noticed(mutant: Mutant, tests: list[str], tree: Path) -> bool:
    """Whether a test of the area fails when the mistake is made in the tree, which is as before afterwards."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutant.made_in(text), encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            words, cwd=tree, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS
        )
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> int:
    """Go through the list; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--area", nargs="*")
    parser.add_argument("--from", dest="first", type=int, default=0)
    options = parser.parse_args()
    every, tests = mutants()
    chosen = [m for m in every if not options.area or m.area in options.area][options.first :]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_of_tree(tree)
        for number, mutant in enumerate(chosen, options.first):
            started = time.monotonic()
            dead = noticed(mutant, tests[mutant.area], tree)
            survivors += [] if dead else [mutant]
            print(
                f"{number} {'noticed ' if dead else 'SURVIVES'} {time.monotonic() - started:5.0f} s  {mutant}",
                flush=True,
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} noticed")
    for mutant in survivors:
        print(f"survives: {mutant}\n  {mutant.old.strip()}\n  {mutant.new.strip()}")
    return int(len(survivors) * 20 > len(chosen))


if __name__ == "__main__":
    sys.exit(main())
