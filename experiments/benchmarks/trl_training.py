"""One run of TRL's DPOTrainer in a process of its own, on the device torch finds: prints one JSON line.

    PYTHON experiments/benchmarks/trl_training.py MODEL_DIR [--pairs 4 --prompt-len 256 --response-len 256 --steps 5]
        [--dtype float32|bfloat16]

PYTHON is an interpreter that has TRL; this file imports nothing of the library. The same work as ``training``: random
tokens of fixed lengths, AdamW, float32 weights (with ``bfloat16`` under autocast), the reference model's
log-probabilities known beforehand. The first update is not counted.
"""

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from typing import Any

# trl is imported where it is used: the collection of doctests imports this file


def measure(
    model: str, *, pairs: int, prompt_len: int, response_len: int, steps: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Seconds a step, the device and the memory used on it."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import datasets
    import torch
    import trl  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    datasets.disable_progress_bars()
    gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if gpu else (lambda: None)
    seconds: list[float] = []
    cpu: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()
            seconds.append(time.perf_counter() - self.start[0])
            cpu.append(time.process_time() - self.start[1])

    class Prepared(trl.DPOTrainer):
        """Takes token ids as they are."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset  # it has them

    draw = random.Random(0)
    lengths = {"prompt_ids": prompt_len, "chosen_ids": response_len, "rejected_ids": response_len}
    known = {"ref_chosen_logps": -10.0 * response_len, "ref_rejected_logps": -10.0 * response_len}
    rows = [
        {**{name: [draw.randrange(100, 1000) for _ in range(n)] for name, n in lengths.items()}, **known}
        for _ in range(pairs * (steps + 1))
    ]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=pairs, num_train_epochs=1, max_length=None,
            learning_rate=1e-6, optim="adamw_torch", use_cpu=not gpu, bf16=dtype == "bfloat16", fp16=False,
            gradient_checkpointing=False, precompute_ref_log_probs=True, logging_steps=10_000, save_strategy="no",
            report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Prepared(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=config,
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    if len(seconds) != steps + 1:
        raise SystemExit(f"TRL made {len(seconds)} updates, expected {steps + 1}")
    return {
        "peer": "trl",
        "version": trl.__version__,
        "torch": torch.__version__,
        "s_per_step_median": statistics.median(seconds[1:]),
        "cpu_s_per_step_median": statistics.median(cpu[1:]),
        "steps": steps,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_device_mib": torch.cuda.max_memory_allocated() / 2**20 if gpu else 0.0,
        "dtype": dtype,
        "platform": "gpu" if gpu else "cpu",
    }


def main() -> None:
    """One run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--response-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = vars(parser.parse_args())
    print(json.dumps(measure(options.pop("model"), **options)))


if __name__ == "__main__":
    main()
