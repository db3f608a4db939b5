"""Plans of pod runs: those that are missing are made, and the table of docs/pods.md is written from all of them.

python -m experiments.pods                    all that are missing (minutes each; needs 'ches-jax[tpu]', no TPU)
python -m experiments.pods --verbs score      of these verbs
python -m experiments.pods --render           only the table
"""

import argparse
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "pods.md"
BEGIN, END = "<!-- plans: begin (python -m experiments.pods --render) -->", "<!-- plans: end -->"
MODELS = ("llama-3-8b", "llama-3-70b", "qwen3-30b-a3b", "deepseek-v3")


class Pod(NamedTuple):
    """Devices, by the name that users know."""

    name: str
    topology: str
    slices: int = 1


PODS = (
    Pod("v5e-16", "v5e:4x4"),
    Pod("v5e-256", "v5e:16x16"),
    Pod("v5p-128", "v5p:4x4x4"),  # the name counts cores, two a chip
    Pod("2 x v6e-256", "v6e:16x16", 2),
)
VERBS: dict[str, dict[str, Any]] = {
    "score": {"what": "score"},
    "score-logps": {"what": "score", "logps": True},
    "train-lora": {"what": "train", "lora_rank": 16},
    "train": {"what": "train"},
    "forecast": {"what": "forecast"},
    "generate": {"what": "generate"},
}

_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1]) + 5))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Runs a command that is ended after so many CPU seconds."""


def file_of(verb: str, model: str, pod: Pod) -> Path:
    """Where a plan lies."""
    return HERE / "plans" / f"{verb}-{model}-{pod.name.replace(' ', '')}.json"


def words_of(verb: str, model: str, pod: Pod) -> list[str]:
    """The command of a plan, without its file."""
    options = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
               for name, value in VERBS[verb].items() if name != "what"]  # fmt: skip
    slices = ["--slices", str(pod.slices)] if pod.slices > 1 else []
    config = f"experiments/pods/configs/{model}.json"
    what = VERBS[verb]["what"]
    return ["plan", what, "--model", config, "--topology", pod.topology, *slices, *" ".join(options).split()]


def make(verbs: list[str], models: list[str], seconds: float) -> None:
    """Compile what is missing, each in a process that is given so many CPU seconds; what takes longer is counted."""
    (HERE / "plans").mkdir(exist_ok=True)
    for verb in verbs:
        for pod in PODS:
            for model in models:
                out = file_of(verb, model, pod)
                if not out.exists():
                    found = compiled(words_of(verb, model, pod), out, seconds)
                    print(out.name, "" if found else "is counted", flush=True)


def compiled(words: list[str], out: Path, seconds: float) -> bool:
    """Whether a plan was compiled; if not, ``out`` has what can be counted, and why."""
    command = [sys.executable, "-m", "ches_jax", *words, "--out", str(out), "--quiet"]
    # CPU seconds: how busy a machine is decides no plan
    limit = [sys.executable, "-c", _LIMITED, str(math.ceil(seconds))]
    done = subprocess.run([*limit, *command], capture_output=True, text=True)
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == -signal.SIGXCPU:
        reason = f"not compiled within {seconds:.0f} CPU seconds"
    if out.exists():
        return True
    subprocess.run([*command, "--arithmetic"], capture_output=True)
    if out.exists():
        out.write_text(json.dumps({**json.loads(out.read_text()), "not_compiled": reason}, indent=2) + "\n")
    return False


def row(verb: str, model: str, pod: Pod, found: dict[str, Any]) -> str:
    """A line of the table."""
    gib, held = 2**30, found["bytes"]
    total = "more than there is" if held["total"] is None else f"{held['total'] / gib:.1f}"
    parts = " + ".join(
        f"{name} {held[name] / gib:.1f}" for name in ("weights", "optimiser", "temporaries") if held.get(name)
    )
    kinds = (found["collectives"] or {}).items()
    moved = ", ".join(f"{kind} {one['bytes'] / 1e9:.2f}" for kind, one in kinds) or "none"
    if found["counted"] != "by the compiler":
        moved = f"*counted: {found['not_compiled']}*" if "not_compiled" in found else "*counted: too large*"
    e = found["estimate"]
    speed = f"{e['pairs_a_second']:.3g} ({e['bound_by']})" if found["fits"] else ""
    mesh = found["mesh"] + (f" in each of {found['processes']} hosts" if found["processes_share"] == "chunks" else "")
    cells = (verb, model, pod.name, mesh, "yes" if found["fits"] else "**no**",
             f"{total} of {held['of'] / gib:.0f} ({parts})", moved, speed)  # fmt: skip
    return f"| {' | '.join(cells)} |"


def render() -> str:
    """The table of all plans that are there."""
    lines = [
        "| what | model | pod | mesh of `auto` | fits | GiB a device | GB moved a device and step | pairs/s at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    missing, versions = [], set()
    for verb in VERBS:
        absent = []
        for model in MODELS:
            for pod in PODS:
                file = file_of(verb, model, pod)
                if file.exists():
                    found = json.loads(file.read_text())
                    lines.append(row(verb, model, pod, found))
                    if found["counted"] == "by the compiler":
                        versions.add(f"jax {found['versions']['jax']}, libtpu {found['versions'].get('libtpu')}")
                else:
                    absent.append(f"{model} on {pod.name}")
        none = len(absent) == len(MODELS) * len(PODS)
        missing += [f"{verb} ({'none' if none else 'not ' + ', '.join(absent)})"] if absent else []
    if not versions:
        return "No plan is kept yet."
    return "\n".join([
        *lines, "", f"Compiled with {'; '.join(sorted(versions))}.",
        f"Not all were compiled here: {'; '.join(missing)}." if missing else "All were compiled.",
    ])  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", nargs="+", choices=list(VERBS), default=list(VERBS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=480, help="of CPU time that a compilation is given")
    parser.add_argument("--render", action="store_true", help="only the table")
    options = parser.parse_args()
    if not options.render:
        make(options.verbs, options.models, options.seconds)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{render()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
