"""Whole ``ches score`` commands in one or several processes, on pairs of random tokens: prints one JSON line.

    python -m experiments.benchmarks.score_run MODEL_DIR --pairs 10000 --length 48 [--processes 1]

Several processes share the chunks of the run (``--distributed``) on this machine; ``ches merge`` joins them. Seconds
and CPU seconds are of all of them, from start to end; memory is that of the largest process.
"""

import argparse
import json
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import ROOT
from experiments.benchmarks.score_scaling import write_pairs

CHUNKS = 8
"""At least so many chunks, that several processes have some each."""


def measure(model: str, count: int, length: int, processes: int) -> dict[str, Any]:
    """One run; every process must end well."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder) / "pairs.jsonl", count, length)
        out = str(Path(folder) / "run")
        rows = str(min(16_384, max(count // CHUNKS, 1)))
        command = [sys.executable, "-m", "ches_jax", "score", "--model", model, "--pairs", str(pairs), "--out", out]
        command += ["--chunk-rows", rows, "--mesh", "data=1", "--quiet"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        joined = [["--distributed", f"{address},{processes},{i}"] if processes > 1 else [] for i in range(processes)]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        running = [subprocess.Popen([*command, *more], cwd=ROOT) for more in joined]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit("a process of the run failed")
        if processes > 1:
            subprocess.run([sys.executable, "-m", "ches_jax", "merge", out], check=True, cwd=ROOT, capture_output=True)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        work = json.loads((Path(out) / "run.json").read_text(encoding="utf-8")).get("work")  # a merged run has none
    return {
        "pairs": count,
        "processes": processes,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 3),
        "largest_process_mb": round(after.ru_maxrss / 1024, 1),
        "pairs_per_second": round(count / seconds, 1),
        "work": work,
    }


def main() -> None:
    """One run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps(measure(args.model, args.pairs, args.length, args.processes)))


if __name__ == "__main__":
    main()
