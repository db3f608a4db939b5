"""Scoring beside PyTorch as a sceptic would have it: one command, a JSON file and a page.

    python -m experiments.benchmarks.side_by_side --data hh=A.jsonl ultrafeedback=B.jsonl long=A.jsonl+400
        --tokenizer DIR [--sizes 3m 30m 120m --threads 1 2 --pairs 96 --repeats 5 --ways ours torch-packed ...]

What could be said against a comparison, and what is done about it:

- *They were not warmed alike.* Every way is a process that loads its model, makes one whole pass that does not count,
  and then waits; the passes that count are made in turn, A B C A B C, by processes that are there already.
- *They computed different rows.* The token ids are cut once and written to one file; the sums of all ways must agree.
- *The peak is not the peak.* After each pass each process multiplies matrices of the model's own shapes, as many rows
  as it multiplies at once; the peak is the best median of any library at that number of threads.
- *Saved work is not speed.* The headline is useful FLOP/s over that peak. Useful is what must be computed: the products
  of the layers' matrices at every position once, a prompt once for its pair, and what all prompts begin with once;
  the same number for all ways.
- *The machine was busy.* Others' CPU time and the hypervisor's steal are measured around each pass; beyond
  ``--most-load`` of a core nothing is written, unless ``--loaded`` says to, and then the page says so.
- *The spread is hidden.* Ratios come with the least and the greatest of the turns.

In ``--data`` a ``+N`` behind a file puts the same N tokens before each of its prompts, as a long system prompt does.
Training and generation have benchmarks of their own (``train_speed``, ``generate_speed``). Not measured here: flex
attention, which compiles on a CPU with a C++ compiler only; TRL and tunix, which do not score.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ches_jax.types import common_prefix
from experiments.benchmarks.measure import RESULTS, ROOT, busy, environment, machine

WAYS = ("ours", "torch-official", "torch-batched", "torch-packed")
SIZES = {"1m": (128, 4), "3m": (256, 4), "30m": (512, 8), "120m": (1024, 10), "1b": (2048, 20)}
"""Width and layers; weights of the layers: about 0.8, 3, 21, 105 and 900 million."""
MOST_LENGTH = 1024
NAME = "side_by_side_cpu"


def write_model(size: str, tokenizer: Path, directory: Path) -> None:
    """A random Llama of a size, in float32."""
    from flax import nnx

    from ches_jax.hf.export import copy_tokenizer
    from ches_jax.models.checkpoint.save import save_pretrained
    from ches_jax.models.decoder import Decoder
    from ches_jax.models.families.registry import decoder_config

    width, layers = SIZES[size]
    raw = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width},
        **{"intermediate_size": width * 43 // 16, "num_hidden_layers": layers, "num_attention_heads": width // 64},
        **{"num_key_value_heads": max(1, width // 128), "max_position_embeddings": 4096, "vocab_size": 32000},
        **{"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "float32"},
    }
    save_pretrained(Decoder(decoder_config(raw), rngs=nnx.Rngs(0)), directory, config=raw)
    copy_tokenizer(tokenizer, directory)


def write_rows(source: str, tokenizer: Path, count: int, out: Path) -> None:
    """The first pairs that are sound and fit, as token ids: ``prompt``, ``chosen``, ``rejected``, without terminators.

    ``source`` is a file, or ``FILE+N``: the same N tokens before every prompt, which each way computes as it can.
    """
    from ches_jax.data.sources import open_pairs
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer

    path, _, more = source.partition("+")
    cut = PairTokenizer(load_tokenizer(tokenizer), MOST_LENGTH)
    rows: list[dict[str, Any]] = []
    ahead: list[int] = []
    for record in open_pairs(path):
        (pair,) = cut([record])
        if pair.flags:
            continue
        if more and len(ahead) < int(more):
            ahead += pair.prompt
            continue
        rows.append(
            {
                "prompt": [*ahead[: int(more or 0)], *pair.prompt],
                "chosen": list(pair.chosen.content),
                "rejected": list(pair.rejected.content),
            }
        )
        if len(rows) == count:
            break
    out.write_text(json.dumps(rows), encoding="utf-8")


def work_of(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, int]:
    """Positions that must be computed: each prompt once for its pair, a beginning of all once; and with none shared."""
    once = sum(len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) for r in rows)
    prompts = sorted(list(r["prompt"]) for r in rows)
    saved = common_prefix(prompts[0], prompts[-1]) * (len(rows) - 1)
    return {"useful_positions": once - saved, "positions_apart": once + sum(len(r["prompt"]) for r in rows)}


class Worker:
    """A way in a process of its own, warmed, that makes a pass when it is asked to."""

    def __init__(self, way: str, model: Path, rows: Path, threads: int):
        """Starts it; ``ready`` waits until it is warm."""
        command = [
            sys.executable,
            "-m",
            "experiments.benchmarks.scoring_ways",
            way,
            str(model),
            str(rows),
            str(threads),
        ]
        quiet = {"JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | quiet
        )

    def ready(self) -> dict[str, Any]:
        """What it says when it is warm."""
        return self._answer()

    def once(self) -> dict[str, Any]:
        """One pass and one measurement of the peak, with what else the machine did meanwhile."""
        before = machine()
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer | busy(before, machine(), answer["all_cpu_seconds"])

    def end(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a way has ended early: {self.process.args}")
        return json.loads(line)


def measured(ways: Sequence[str], model: Path, rows: Path, threads: int, repeats: int) -> dict[str, Any]:
    """All ways in turn on one model, one list of rows and a number of threads."""
    workers: dict[str, Worker] = {}
    ready: dict[str, dict[str, Any]] = {}
    for way in ways:  # one after the other: warming is not to be disturbed either
        workers[way] = Worker(way, model, rows, threads)
        ready[way] = workers[way].ready()
    turns = [{way: worker.once() for way, worker in workers.items()} for _ in range(repeats)]
    for worker in workers.values():
        worker.end()
    return compared(ready, turns, work_of(json.loads(rows.read_text(encoding="utf-8"))))


def compared(
    ready: Mapping[str, Mapping[str, Any]], turns: Sequence[Mapping[str, Mapping[str, Any]]], work: Mapping[str, int]
) -> dict[str, Any]:
    """Medians, useful FLOP/s over the peak, and ratios to ours turn by turn.

    Raises:
      SystemExit: the ways did not compute the same.
    """
    sums = {way: r["ches_sum"] for way, r in ready.items()}
    if max(sums.values()) - min(sums.values()) > 1e-3 * max(map(abs, sums.values())):
        raise SystemExit(f"the sums of CHES differ: {sums}")
    peak = max(statistics.median(t[way]["peak_gflops"] for t in turns) for way in ready)
    flops = 2 * ready[next(iter(ready))]["weights"] * work["useful_positions"]
    table: dict[str, Any] = {}
    for way in ready:
        seconds = [t[way]["cpu_seconds"] for t in turns]
        useful = flops / statistics.median(seconds) / 1e9
        table[way] = {
            "cpu_seconds": statistics.median(seconds),
            "cpu_seconds_range": [min(seconds), max(seconds)],
            "seconds": statistics.median(t[way]["seconds"] for t in turns),
            "useful_gflops_per_core": round(useful, 2),
            "share_of_peak": round(useful / peak, 4),
            "warming_cpu_seconds": ready[way]["warming_cpu_seconds"],
            "computed_positions": ready[way]["positions"],
            "peak_gflops": round(statistics.median(t[way]["peak_gflops"] for t in turns), 2),
        }
    ratios = {}
    for way in (w for w in ready if w != "ours" and "ours" in ready):
        each = [t[way]["cpu_seconds"] / t["ours"]["cpu_seconds"] for t in turns]
        ratios[way] = [round(x, 3) for x in (min(each), statistics.median(each), max(each))]
    load = {k: statistics.median(t[w][k] for t in turns for w in ready) for k in ("others", "steal")}
    return {"table": table, "ratios": ratios, "peak_gflops_per_core": round(peak, 2), "load": load, **work}


def main() -> None:
    """Measures all, refuses on a busy machine, writes the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FILE[+N]")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["3m", "30m", "120m"], choices=SIZES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most-load", type=float, default=0.15, help="cores that others, or the hypervisor, may use")
    parser.add_argument("--loaded", action="store_true", help="write what a busy machine gave, marked as such")
    parser.add_argument("--add", action="store_true", help="keep the other cases of the file that is there")
    parser.add_argument("--out", type=Path, help="where JSON and page go; default: results of the benchmarks")
    args = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory(prefix="ches-bench-") as folder:
        models = {size: Path(folder) / size for size in args.sizes}
        for size, directory in models.items():
            write_model(size, args.tokenizer, directory)
        for name, _, source in (word.partition("=") for word in args.data):
            rows = Path(folder) / f"{name}.json"
            write_rows(source, args.tokenizer, args.pairs, rows)
            for size, directory in models.items():
                for threads in args.threads:
                    print(f"{name}, {size}, {threads} threads", file=sys.stderr, flush=True)
                    result = measured(args.ways, directory, rows, threads, args.repeats)
                    what = {"data": name, "size": size, "threads": threads, "pairs": args.pairs}
                    cases.append({**what, "repeats": args.repeats, **result})
    worst = max(max(case["load"].values()) for case in cases)
    if worst > args.most_load and not args.loaded:
        raise SystemExit(
            f"the machine was busy: {worst:.2f} cores were not ours (--most-load {args.most_load}); nothing is "
            "written: run it on a quiet machine, or with --loaded to keep numbers that say so"
        )
    from experiments.benchmarks.side_by_side_page import write_page

    folder = args.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path, measured_on = folder / f"{NAME}.json", environment()
    if args.add:
        cases = added(json.loads(path.read_text(encoding="utf-8")), measured_on, cases)
    loaded = any(max(case["load"].values()) > args.most_load for case in cases)
    result = {"environment": measured_on, "loaded": loaded, "cases": cases}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path, write_page(result, path.with_suffix(".html")))


def added(
    before: Mapping[str, Any], measured_on: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The cases that were there, but those measured again, and the new ones.

    Raises:
      SystemExit: those that were there are of another commit, machine or version.
    """
    if before["environment"] != measured_on:
        raise SystemExit("--add: the cases that are there were measured in another environment; measure all again")
    new = {(c["data"], c["size"], c["threads"]) for c in cases}
    return [c for c in before["cases"] if (c["data"], c["size"], c["threads"]) not in new] + list(cases)


if __name__ == "__main__":
    main()
