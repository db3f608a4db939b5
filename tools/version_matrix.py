"""Whether the wheel works on other versions of Python and jax: in a fresh environment for each pair, recorded as JSON.

    python tools/version_matrix.py [--python python3.12 ...] [--jax 0.10.2 newest ...] [--out FILE.json]

Each environment has the wheel, what it requires, and the jax that was named, whatever the wheel's upper bound says.
Then a few tests, `ches score`, `ches train` and claims of `ches verify` run, away from the checkout. The record keeps
what other pairs gave before; a pair that fails has the last line of what failed. If a jax passes with every Python
that was tried with it, and is not below the bound of pyproject.toml, the bound is raised to the next minor version.
Exit code 1 when one fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).with_suffix(".json")
BOUND = re.compile(r'("jax(?:\[\w+\])?>=[\d.]+,<)(\d+\.\d+)"')
"""The upper bound of jax, in each place where pyproject.toml has it."""
TESTS = ("tests/models/test_logprobs.py", "tests/models/test_segments.py", "tests/scores/test_formulas.py")
NEEDED = ("pytest>=9", "hypothesis>=6.100", "beartype>=0.20")
STEPS = {
    "version": "-m ches_jax --version",
    "score": "-m ches_jax score --limit 8 --logps --by head_score --quiet --out score",
    "train": "-m ches_jax train --limit 8 --batch-size 4 --steps 2 --mesh data=1 --quiet --out train",
    "verify": "-m ches_jax verify --claims L1 T4 K0 --instances 20 --quiet",
    "tests": f"-m pytest -q -p no:cacheprovider {' '.join(TESTS)}",
}
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "datasets", "pyarrow")


def run(words: list[str], place: Path, environment: dict[str, str] | None = None) -> str | None:
    """None where a command succeeds, else the last line that it wrote."""
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, env=environment)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return None if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[-1][:300]


def wheel(folder: Path) -> Path:
    """The wheel of the checkout."""
    failed = run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], folder)
    if failed:
        raise SystemExit(f"no wheel: {failed}")
    return next(folder.glob("*.whl"))


def try_pair(python: str, jax: str, built: Path, place: Path) -> dict[str, Any]:
    """What happens with one Python and one jax (``newest``, or a version)."""
    began = time.monotonic()
    failed = run([python, "-m", "venv", str(place / "venv")], place)
    own = str(place / "venv" / "bin" / "python")
    install = [own, "-m", "pip", "install", "-q"]
    wanted = ["-U", "jax", "jaxlib"] if jax == "newest" else [f"jax=={jax}", f"jaxlib=={jax}"]
    # the pip that comes with an older Python tries every version of a library where a newer one sees what conflicts
    installs = [["-U", "pip"], [str(built), *NEEDED], wanted]
    failed = failed or next((said for words in installs if (said := run([*install, *words], place))), None)
    if failed:
        return {"installs": failed}
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR")}
    environment |= {"JAX_PLATFORMS": "cpu", "CHES_COMPILATION_CACHE": "off"}
    asked = (
        f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {SHOWN}}}))"
    )
    versions = json.loads(subprocess.run([own, "-c", asked], capture_output=True, text=True, check=True).stdout)
    steps = {name: run([own, *words.split()], place, environment) or "passed" for name, words in STEPS.items()}
    return {"versions": versions, **steps, "seconds": round(time.monotonic() - began)}


def raised(project: str, record: dict[str, Any]) -> str:
    """pyproject.toml with the bound above the newest jax that passed everything, wherever it was tried; never lowered.

    >>> passed = dict.fromkeys(STEPS, "passed")
    >>> raised('"jax[tpu]>=0.10.2,<0.12"', {"a": {"versions": {"jax": "0.12.1"}, **passed}})
    '"jax[tpu]>=0.10.2,<0.13"'
    """
    passes: dict[str, bool] = {}
    for found in record.values():
        if jax := found.get("versions", {}).get("jax"):
            passes[jax] = passes.get(jax, True) and all(found.get(step) == "passed" for step in STEPS)
    good = [tuple(int(n) for n in jax.split(".")[:2]) for jax, all_passed in passes.items() if all_passed]
    major, minor = max(good, default=(0, 0))

    def above(match: re.Match[str]) -> str:
        before = tuple(int(n) for n in match[2].split("."))
        return f'{match[1]}{".".join(map(str, max(before, (major, minor + 1))))}"'

    return BOUND.sub(above, project)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--jax", nargs="+", default=["0.10.2", "newest"], help="versions")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    good = True
    with tempfile.TemporaryDirectory() as folder:
        built = wheel(Path(folder))
        for python in options.python:
            told = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout
            name = re.sub(r"^Python ", "", told.strip())
            for jax in options.jax:
                with tempfile.TemporaryDirectory() as place:
                    found = try_pair(python, jax, built, Path(place))
                good &= all(found.get(step) == "passed" for step in STEPS)
                record[f"Python {name}, jax {found.get('versions', {}).get('jax', jax)}"] = found
                options.out.write_text(json.dumps(record, indent=2) + "\n")
                print(json.dumps({name: found}), flush=True)
    project = ROOT / "pyproject.toml"
    project.write_text(raised(project.read_text(encoding="utf-8"), record), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
