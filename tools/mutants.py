"""Small plausible mistakes, one after another, against the tests of their area: which of them does no test catch?

    python tools/mutants.py [--area AREA ...] [--again]

The list is ``mutants.toml``, what came of it ``mutants_found.json``: for each mistake the test that caught it. Only
mistakes without such a test are tried, all of them with ``--again``, and then first against the test that caught
them before. The file is written after each, so that a stopped run can continue.

Each mistake is made in a copy of the tree, and a process forked from this one, which has imported what the tests need
and nothing of the project, runs the fast tests of the area until one fails. A test counts only where it passes without
the mistake. The exit code is 1 where more than one in twenty survives.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")
FOUND = Path(__file__).with_name("mutants_found.json")
TREE = ROOT / ".pytest_cache" / "mutants"
"""Where the mistakes are made: a copy of the tracked files."""
SURVIVES = "survives"
SECONDS = 600
"""Of processor time, after which a mistake counts as caught: the tests hang. Of the clock: three times that."""
IMPORTED = (
    "jax", "jax.numpy", "flax.nnx", "optax", "orbax.checkpoint", "transformers", "datasets", "pyarrow.parquet",
    "scipy.stats", "hypothesis", "_hypothesis_pytestplugin", "xdist.plugin", "beartype", "jaxtyping", "chex", "tyro",
    "pytest",
)  # fmt: skip
"""None of them computes anything when it is imported: the process may fork afterwards."""

OPTIONS = (
    *("-m", "not slow", "-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:typeguard"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)


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
    tests: list[str] = field(default_factory=list)
    """The tests that have to catch it; without any, those of the area."""
    argued: str = ""
    """Why no test has to catch it: of a survivor."""

    @property
    def name(self) -> str:
        """What the file of results calls it."""
        return f"{self.file}: {self.breaks}"

    def made_in(self, text: str) -> str:
        """The text of the file with the mistake.

        Raises:
          ValueError: the old text is not there as often as it should be.
        """
        if text.count(self.old) != self.occurs:
            raise ValueError(f"{self.name}: its text is there {text.count(self.old)} times, expected {self.occurs}")
        return text.replace(self.old, self.new)


def mutants() -> tuple[list[Mutant], dict[str, list[str]]]:
    """The list, and the tests of each area."""
    read = tomllib.loads(LIST.read_text(encoding="utf-8"))
    return [Mutant(**mutant) for mutant in read["mutant"]], read["tests"]


def found() -> dict[str, str]:
    """The test that caught each mistake, or ``survives``."""
    return json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {}


def copy_of_tree(folder: Path) -> None:
    """The tracked files of the working tree, and no others; bytecode of what has not changed stays."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    for path in [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"]:
        if path.relative_to(folder).as_posix() not in names:
            path.unlink()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


class Failures:
    """A plugin of pytest that remembers what failed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.names.append(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.names.append(report.nodeid)


def failures(tree: Path, tests: Sequence[str], *options: str) -> list[str]:
    """The tests that fail in a tree, in a child of this process; a child that dies or hangs fails the first of them."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            os.chdir(tree)
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            sys.path[0] = os.environ["PYTHONPATH"] = str(tree)
            sys.dont_write_bytecode = False
            import pytest

            seen = Failures()
            pytest.main([*OPTIONS, *options, *tests], plugins=[seen])
            os.write(write, json.dumps(seen.names).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    status = None
    for _ in range(3 * SECONDS * 20):
        if (done := os.waitpid(child, os.WNOHANG))[0]:
            status = done[1]
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(read) as answer:
        names = answer.read()
    return [tests[0]] if status else json.loads(names or json.dumps([tests[0]]))


def noticed_by(mutant: Mutant, tests: Sequence[str], tree: Path) -> str:
    """The test that fails when the mistake is made in the tree, which is as before afterwards; or ``survives``.

    Args:
      mutant: the mistake.
      tests: files, folders or tests, one after another.
      tree: a copy of the tree.
    """
    path = tree / mutant.file
    text, times = path.read_text(encoding="utf-8"), path.stat()
    path.write_text(mutant.made_in(text), encoding="utf-8")
    second = secrets.randbelow(2**31)
    os.utime(path, (second, second))  # bytecode is matched by the second of its file and the length
    try:
        for test in tests:
            if names := failures(tree, [test], "-x"):
                return names[0]
        return SURVIVES
    finally:
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def prepare() -> None:
    """Import what the tests need, with the settings that ``tests`` makes before jax is imported."""
    spec = importlib.util.spec_from_file_location("settings_of_the_tests", ROOT / "tests" / "compiled.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from hypothesis import Phase, settings

    settings.register_profile("no smallest example", phases=(Phase.explicit, Phase.reuse, Phase.generate))
    settings.load_profile("no smallest example")
    gc.collect()
    gc.freeze()  # what is imported is not searched in each child


def main() -> int:
    """Go through the list; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", nargs="*", help="only these")
    parser.add_argument("--again", action="store_true", help="those too that a test caught before")
    options = parser.parse_args()
    every, areas = mutants()
    before = found()
    results = {m.name: before[m.name] for m in every if m.name in before}
    chosen = [m for m in every if not options.area or m.area in options.area]
    if not options.again:
        chosen = [m for m in chosen if results.get(m.name, SURVIVES) == SURVIVES and not m.argued]
    prepare()
    copy_of_tree(TREE)
    for number, mutant in enumerate(chosen, 1):
        started = time.monotonic()
        known = results.get(mutant.name, SURVIVES)
        first = [] if known == SURVIVES else [known]
        which = noticed_by(mutant, [*first, *(mutant.tests or areas[mutant.area])], TREE)
        results[mutant.name] = which
        write(every, results)
        print(f"{number} of {len(chosen)} {time.monotonic() - started:4.0f} s  {mutant.name}\n    {which}", flush=True)
    noticing = {results[m.name] for m in chosen} - {SURVIVES}
    for test in failures(TREE, sorted(noticing)) if noticing else []:
        print(f"fails without a mistake, and so tells nothing: {test}")
        results = {name: SURVIVES if which == test else which for name, which in results.items()}
    write(every, results)
    surviving = [m for m in chosen if results[m.name] == SURVIVES]
    print(f"{len(chosen) - len(surviving)} of {len(chosen)} caught")
    for mutant in surviving:
        print(f"survives: {mutant.name}\n  {mutant.old.strip()}\n  {mutant.new.strip()}")
    return int(len(surviving) * 20 > len(chosen))


def write(every: Sequence[Mutant], results: dict[str, str]) -> None:
    """Keep what has been found, in the order of the list."""
    ordered = {m.name: results[m.name] for m in every if m.name in results}
    FOUND.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
