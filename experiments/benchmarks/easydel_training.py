"""One run of EasyDeL's DPOTrainer in a process of its own, on the device jax finds: prints one JSON line.

    PYTHON -m experiments.benchmarks.easydel_training MODEL_DIR [--pairs 4 --prompt-len 256 --response-len 256]
        [--steps 5 --lengths FILE]

PYTHON is an interpreter that has EasyDeL; nothing of the library is imported. The same work as ``training``: random
tokens of the same lengths in every update, AdamW, float32, the reference model's log-probabilities known beforehand.
Shapes are fixed: prompts and responses are padded to the longest of the batch. A step is what its loop runs for a
batch; the first one is timed by itself.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from experiments.benchmarks.fixed_lengths import random_pairs, step_options, step_parser, step_times, with_reference
from experiments.benchmarks.measure import usage

# easydel is imported where it is used: the collection of doctests imports this file


def measure(
    model: str, batch: Sequence[Sequence[int]], *, steps: int, lora_rank: int | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """Seconds a step and the memory used; ``batch`` as for ``training.measure``."""
    if lora_rank is not None or dtype != "float32":
        raise SystemExit("EasyDeL is timed in float32, without adapters")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", WANDB_MODE="disabled")
    import datasets
    import easydel  # pyright: ignore[reportMissingImports]
    import jax
    import jax.numpy as jnp
    from transformers import AutoTokenizer

    seconds: list[float] = []
    cpu: list[float] = []

    class Timed(easydel.DPOTrainer):
        """Times what its loop runs for a batch; a step that failed ends the run."""

        def _execute_train_step(self, state: Any, batch: Any) -> Any:
            start = time.perf_counter(), time.process_time()
            done = super()._execute_train_step(state, batch)
            jax.block_until_ready(done[1].loss)
            seconds.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
            if done[2] is not None:
                raise done[2]
            return done

    prompt, response = max(p for p, _, _ in batch), max(max(c, r) for _, c, r in batch)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        arguments = easydel.DPOConfig(
            save_directory=folder,
            total_batch_size=len(batch),
            num_train_epochs=1,
            max_training_steps=steps + 1,
            max_prompt_length=prompt,
            max_completion_length=response,
            max_length=prompt + response,
            learning_rate=1e-6,
            optimizer="adamw",
            scheduler="none",
            do_last_save=False,
            save_optimizer_state=False,
            report_metrics=False,
            log_steps=10_000,
            report_steps=10_000,
            use_wandb=False,
            track_memory=False,
            shuffle_train_dataset=False,
            progress_bar_type="tqdm",
            verbose=False,
        )
        trainer = Timed(
            arguments=arguments,
            model=easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
                model, dtype=jnp.float32, param_dtype=jnp.float32
            ),
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(
                rows_of(batch, prompt, response, tokenizer.pad_token_id) * (steps + 1)
            ),
        )
        trainer.train()
    return {
        "peer": "easydel",
        "version": version("easydel"),
        "jax": jax.__version__,
        **step_times(seconds, cpu, steps),
        "peak_rss_mib": usage()["peak_rss_mb"],
        "dtype": dtype,
        "platform": jax.default_backend(),
    }


def rows_of(batch: Sequence[Sequence[int]], prompt: int, response: int, padding: int) -> list[dict[str, Any]]:
    """Its tokenised rows: prompts padded on the left, responses on the right, log-probabilities of a reference.

    >>> row = rows_of([[1, 2, 1]], 2, 2, 0)[0]
    >>> row["prompt_attention_mask"], row["chosen_attention_mask"], row["rejected_attention_mask"]
    ([0, 1], [1, 1], [1, 0])
    """
    rows = []
    for tokens in with_reference(random_pairs(batch)):
        row = {f"ref_{side}_logps": tokens[f"ref_{side}_logps"] for side in ("chosen", "rejected")}
        for name, length in (("prompt", prompt), ("chosen", response), ("rejected", response)):
            ids = tokens[f"{name}_ids"]
            rest = [padding] * (length - len(ids))
            mask, none = [1] * len(ids), [0] * len(rest)
            left = name == "prompt"
            row[f"{name}_input_ids"] = rest + ids if left else ids + rest
            row[f"{name}_attention_mask"] = none + mask if left else mask + none
        rows.append(row)
    return rows


def main() -> None:
    """One run."""
    print(json.dumps(measure(**step_options(step_parser(__doc__)))))


if __name__ == "__main__":
    main()
