"""Run commands interleaved in their own processes and keep what they print: one JSON object on the last line each.

Machines drift: only commands run in turn, A B A B, can be compared, and the ratio of medians is what counts.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def spent(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[str, dict[str, float]]:
    """Run one command; what it printed, and the seconds, CPU seconds and peak memory of its process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **(env or {})}
    )
    errors: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    stderr = process.stderr
    drain = threading.Thread(target=lambda: errors.append(stderr.read()))
    drain.start()
    output = process.stdout.read()
    drain.join()
    process.stdout.close()
    stderr.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[0][-2000:]}")
    return output, {
        "process_seconds": round(time.perf_counter() - started, 3),
        "process_cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_mb": round(usage.ru_maxrss / 1024, 1),
    }


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one command; its last line of output as JSON, with what its process spent."""
    output, usage = spent(command, env)
    return {**json.loads(output.strip().splitlines()[-1]), **usage}


def machine() -> dict[str, float]:
    """Seconds of all processors since the machine started: at work, stolen by the hypervisor; and the time."""
    words = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(w) / os.sysconf("SC_CLK_TCK") for w in words[:8])
    return {"busy": user + nice + system + irq + softirq, "steal": steal, "time": time.perf_counter()}


def busy(before: Mapping[str, float], after: Mapping[str, float], own: float) -> dict[str, float]:
    """Cores that others used meanwhile, and cores that the hypervisor took.

    >>> busy({"busy": 0, "steal": 0, "time": 0}, {"busy": 3, "steal": 1, "time": 2}, own=2.0)
    {'others': 0.5, 'steal': 0.5}
    """
    wall = max(after["time"] - before["time"], 1e-9)
    others = max(after["busy"] - before["busy"] - own, 0.0)
    return {"others": round(others / wall, 3), "steal": round((after["steal"] - before["steal"]) / wall, 3)}


def interleaved(commands: Mapping[str, Sequence[str]], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Every command ``repeats`` times, in turn, each with what else the machine did meanwhile."""
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(repeats):
        for name, command in commands.items():
            print(f"[{turn + 1}/{repeats}] {name}", file=sys.stderr)
            before = machine()
            record = run(command)
            records[name].append(record | busy(before, machine(), record["process_cpu_seconds"]))
    return records


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of every number, anything else from the first run."""
    numbers = {k for k, v in runs[0].items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: statistics.median(r[k] for r in runs) if k in numbers else v for k, v in runs[0].items()}


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    from ches_jax.runs.directory import versions

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    cpu = dict(line.split("\t", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t" in line)
    known = {name: text.partition(":")[2].strip() for name, text in cpu.items()}
    return {
        "commit": commit.stdout.strip() or None,
        "versions": versions(),
        "cpu": known.get("model name") or platform.processor(),
        "vectors": widest_vectors(known.get("flags", "")),
        "cores": os.cpu_count(),
    }


def widest_vectors(flags: str) -> str | None:
    """The widest instructions on vectors among a CPU's flags: they decide how fast it multiplies.

    >>> widest_vectors("sse2 avx avx2 fma"), widest_vectors("avx2 avx512f"), widest_vectors("asimd")
    ('avx2', 'avx512f', None)
    """
    return next((name for name in ("avx512f", "avx2", "avx") if name in flags.split()), None)


def keep(name: str, result: Mapping[str, Any]) -> Path:
    """Write a result with its environment to ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n", encoding="utf-8")
    return path


def usage() -> dict[str, float]:
    """CPU seconds and peak memory of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_rss_mb": used.ru_maxrss / 1024}
