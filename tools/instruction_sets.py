"""What differs between the instruction sets of one machine: scores, a training run, claims, the bytes of a resumed run.

    python tools/instruction_sets.py [--out FILE.json] [--claims ID ...] [SET ...]

XLA compiles for the instructions that ``--xla_cpu_max_isa`` names, so one machine can be several: by default SSE4_2,
AVX and AVX2 (a machine that has AVX512 may name it). NumPy and the C library are not limited by it. Each set runs in
processes of its own; the first is what the others are compared with.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it
import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).with_suffix(".json")
SETS = ("SSE4_2", "AVX", "AVX2")
SCORE = "score --by head_score --logps --on-bad-row drop --limit 24"
TRAIN = """
import os, sys
from ches_jax.train.config import TrainConfig
from ches_jax.train.loop import train
out, dies, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
small = dict(limit=24, holdout=6, steps=4, batch_size=4, lr=1e-4, eval_every=2, save_every=2, mesh="data=1")
def see(done, model):
    if done == dies:
        os._exit(0)
    return {}
train(TrainConfig(**small, on_bad_row="drop", out=out), resume=resume, quiet=True, observers=[see])
"""
"""Four updates; the process ends without a word after ``dies`` of them."""
CLAIMS = ("T4", "T6", "K0", "A3", "E1", "E2", "L1", "R2", "R4")
INSTANCES = 100
COLUMNS = ("ches", "ln_ches", "head_score", "last_hidden_inner", "logp_chosen", "logp_rejected")


def python(isa: str, *words: str) -> None:
    """Python compiled for an instruction set; claims that fail show in their result.

    Raises:
      SystemExit: another error.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={isa}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a program of another set would be taken from it
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode not in ((0, 1) if "verify" in words else (0,)):
        raise SystemExit(f"{isa}: {' '.join(words)}\n{done.stderr}")


def run(isa: str, place: Path, claims: list[str]) -> None:
    """All commands with one set; the training once whole, and once as a process that dies and is resumed."""
    ches = ("-m", "ches_jax")
    python(isa, *ches, *SCORE.split(), "--quiet", "--out", str(place / "score"))
    python(isa, "-c", TRAIN, str(place / "train"), "-1", "begin")
    python(isa, "-c", TRAIN, str(place / "resumed"), "3", "begin")
    python(isa, "-c", TRAIN, str(place / "resumed"), "-1", "resume")
    words = ("verify", "--instances", str(INSTANCES), "--claims", *claims, "--out", str(place / "claims"))
    python(isa, *ches, *words)


def relative(a: Any, b: Any, scale: Any = None) -> float:
    """Largest difference in units of the larger number, or of a scale."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    unit = np.maximum(np.abs(a), np.abs(b)) if scale is None else np.abs(np.asarray(scale, np.float64))
    return float(np.max(np.abs(a - b) / np.where(unit > 0, unit, 1.0), initial=0.0))


def scores(place: Path) -> dict[str, list]:
    """The columns of the score table."""
    return pq.read_table(place / "score" / "scores.parquet").to_pydict()


def of_claims(place: Path) -> dict[str, dict[str, Any]]:
    """Claims by their ids."""
    return {c["id"]: c for c in json.loads((place / "claims" / "claims.json").read_text())["claims"]}


def weights(place: Path) -> dict[str, np.ndarray]:
    """Of the exported model, as numbers that can be compared."""
    return {name: w.astype(np.float32) for name, w in load_file(place / "model" / "model.safetensors").items()}


def bytes_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What a run leaves behind but for what tells of its process, and checkpoints, whose files hold times."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name != "run.json" and not name.startswith("checkpoints/"):
            yield name, path.read_bytes()


def compared(first: Path, other: Path) -> dict[str, Any]:
    """The largest differences between two sets."""
    a, b = scores(first), scores(other)
    scale = np.array(a["sqnorm_chosen"])
    by = {"ches": scale, "inner": scale, "head_score": np.max(np.abs(a["head_score"]))}
    wa, wb = weights(first / "train"), weights(other / "train")
    lines = [(p / "train" / "metrics.jsonl").read_text().splitlines() for p in (first, other)]
    losses = [[json.loads(line).get("loss", 0.0) for line in some] for some in lines]
    values = [of_claims(place) for place in (first, other)]
    return {
        "scores": {name: relative(a[name], b[name], by.get(name)) for name in COLUMNS if name in a},
        "ranks_of_ches_equal": bool((np.argsort(a["ches"]) == np.argsort(b["ches"])).all()),
        "loss": relative(*losses),
        "weights": max(float(np.max(np.abs(wa[n] - wb[n]))) for n in wa),
        "claims": {i: [one["value"], values[1][i]["value"]] for i, one in values[0].items()},
    }


def main() -> int:
    """Run and compare; the exit code is 1 where a claim's outcome, or a resumed run's bytes, rest on the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS))
    parser.add_argument("--claims", nargs="*", default=list(CLAIMS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "command": f"python tools/instruction_sets.py {' '.join(options.sets)}",
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "machine": platform.machine(),
        "tolerances": "scores relative to |S+|^2 (ches) or to themselves; weights absolute, after 4 updates at 1e-4",
        "sets": {},
    }
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        for isa in options.sets:
            place = Path(folder) / isa
            run(isa, place, options.claims)
            passed = {i: c["passed"] for i, c in of_claims(place).items()}
            same = dict(bytes_below(place / "train")) == dict(bytes_below(place / "resumed"))
            found = {"claims_passed": sum(passed.values()), "claims": len(passed), "resumed_to_the_same_bytes": same}
            if isa != options.sets[0]:
                found["against"] = options.sets[0]
                found |= {"differences": compared(Path(folder) / options.sets[0], place)}
            record["sets"][isa] = found
            bad |= not same or not all(passed.values())
            print(f"{isa}: {json.dumps(found)}", file=sys.stderr, flush=True)
            options.out.write_text(json.dumps(record, indent=1, allow_nan=False, default=finite) + "\n")
    return int(bad)


def finite(value: Any) -> Any:
    """Numbers of NumPy as those of JSON."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


if __name__ == "__main__":
    sys.exit(main())
