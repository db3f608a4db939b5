"""One run of TRL's DPOTrainer in a process of its own, on the device torch finds: prints one JSON line.

    PYTHON -m experiments.benchmarks.trl_training MODEL_DIR [--pairs 4 --prompt-len 256 --response-len 256 --steps 5]
        [--lengths FILE --lora-rank 8 --dtype float32|bfloat16]

PYTHON is an interpreter that has TRL (and peft, for ``--lora-rank``); nothing of the library is imported. The same
work as ``training``: random tokens of the same lengths in every update, padded as TRL pads, AdamW, float32 weights
(with ``bfloat16`` under autocast), the reference model's log-probabilities known beforehand. The first update is
timed by itself. The log-probabilities are computed in tiles, without the logits of all positions: in TRL 1.16 that is
the only way (``trl.trainer.utils.add_fused_lm_head``), and ``padding_free`` is switched off with a warning.
"""

import importlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.fixed_lengths import random_pairs, step_options, step_parser, step_times, with_reference
from experiments.benchmarks.measure import usage

# trl is imported where it is used: the collection of doctests imports this file


def measure(
    model: str,
    batch: Sequence[Sequence[int]],
    *,
    steps: int,
    lora_rank: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Seconds a step, the device and the memory used on it; ``batch`` as for ``training.measure``."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import datasets
    import torch
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

    trl: Any = importlib.import_module("trl")

    class Prepared(trl.DPOTrainer):
        """Takes token ids as they are."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset  # it has them

    rows = with_reference(random_pairs(batch))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(rows),
            num_train_epochs=steps + 1,
            max_length=None,
            learning_rate=1e-6,
            optim="adamw_torch",
            use_cpu=not gpu,
            bf16=dtype == "bfloat16",
            fp16=False,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            logging_steps=10_000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        trainer = Prepared(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
            peft_config=adapters(lora_rank),
        )
        trainer.train()
    return {
        "peer": "trl",
        "version": trl.__version__,
        "torch": torch.__version__,
        **step_times(seconds, cpu, steps),
        "peak_rss_mib": usage()["peak_rss_mb"],
        "peak_device_mib": torch.cuda.max_memory_allocated() / 2**20 if gpu else 0.0,
        "dtype": dtype,
        "platform": "gpu" if gpu else "cpu",
    }


def adapters(rank: int | None) -> Any:
    """Adapters of a rank on all linear layers, as ``ches train --lora-rank`` has them, or none."""
    if rank is None:
        return None
    import peft  # pyright: ignore[reportMissingImports]

    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def main() -> None:
    """One run."""
    print(json.dumps(measure(**step_options(step_parser(__doc__)))))


if __name__ == "__main__":
    main()
