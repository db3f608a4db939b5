"""Train with TRL's DPOTrainer on prepared token ids, in their order; write loss and log-probabilities of every step.

    python trl_steps.py JOB.json OUT.json

Run by test_trl.py in a process of its own. The job names model, rows
(``prompt_ids, chosen_ids, rejected_ids``), rows of a step, optimiser, learning rate and beta.
"""

import importlib
import json
import os
import sys
import tempfile
from typing import Any

# trl is imported where it is used: the collection of doctests imports this file


def main(job_path: str, out_path: str) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import datasets
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl: Any = importlib.import_module("trl")

    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    steps: list[dict[str, float]] = []

    class Ordered(trl.DPOTrainer):
        """Takes token ids as they are, in their order, and notes every step in full precision."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def _compute_loss(self, model, inputs, return_outputs):
            result = super()._compute_loss(model, inputs, return_outputs)
            loss = result[0] if return_outputs else result
            last = {n: self._metrics["train"][n][-1] for n in ("logps/chosen", "logps/rejected", "rewards/margins")}
            steps.append({"loss": loss.item(), **last})
            return result

    def load():
        return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float64)

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=job["batch_size"],
            num_train_epochs=1,
            max_length=None,
            learning_rate=job["lr"],
            lr_scheduler_type="constant",
            optim=job["optim"],
            weight_decay=0.0,
            max_grad_norm=0.0,
            beta=job["beta"],
            use_cpu=True,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        rows = datasets.Dataset.from_list(job["rows"])
        Ordered(model=load(), ref_model=load(), args=config, train_dataset=rows, processing_class=tokenizer).train()
    with open(out_path, "w", encoding="utf-8") as file:
        json.dump({"trl": trl.__version__, "steps": steps}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
