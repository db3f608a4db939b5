"""Makes the logs of TRL in ``logs/``: real trainers, a small model, a few pairs; minutes on two cores.

    python -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0 tensorboard
    trl/bin/python tests/displacement/make_logs.py MODEL PAIRS.jsonl WORK

TRL is no dependency of the tests: what it wrote is committed (``trainer_state.json``, shortened to the keys that a
reader could use), and ``expected.json`` says what each log is.
"""

import json
import sys
from pathlib import Path

LOGS = Path(__file__).parent / "logs"
TIMES = ("runtime", "_per_second")
STEPS, EVALUATIONS = 20, 10


def pairs(path: str, first: int, count: int) -> list[dict[str, str]]:
    """Short pairs of a file."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    short = [r for r in rows if len(r["prompt"]) + max(len(r["chosen"]), len(r["rejected"])) < 300]
    return [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in short[first : first + count]]


def main(model: str, data: str, work: str) -> None:
    """Trains with each trainer and keeps its log."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import (  # pyright: ignore[reportMissingImports]
        DPOConfig,  # pyright: ignore[reportPrivateImportUsage]
        DPOTrainer,  # pyright: ignore[reportPrivateImportUsage]
        KTOConfig,  # pyright: ignore[reportPrivateImportUsage]
        KTOTrainer,  # pyright: ignore[reportPrivateImportUsage]
    )
    from trl.experimental.cpo import CPOConfig, CPOTrainer  # pyright: ignore[reportMissingImports]
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # pyright: ignore[reportMissingImports]

    train, held_out = Dataset.from_list(pairs(data, 0, 40)), Dataset.from_list(pairs(data, 200, 8))
    runs = {
        "trl_dpo": (DPOTrainer, DPOConfig, {"beta": 0.1, "learning_rate": 1e-4}),
        "trl_dpo_high_rate": (DPOTrainer, DPOConfig, {"beta": 0.05, "learning_rate": 1e-3}),
        "trl_dpo_sft": (DPOTrainer, DPOConfig, {"loss_type": ["sigmoid", "sft"], "learning_rate": 1e-3}),
        "trl_ipo": (DPOTrainer, DPOConfig, {"loss_type": "ipo", "learning_rate": 1e-4}),
        "trl_kto": (KTOTrainer, KTOConfig, {"beta": 0.1, "learning_rate": 1e-4}),
        "trl_cpo": (CPOTrainer, CPOConfig, {"beta": 0.1, "learning_rate": 1e-4}),
        "trl_simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "learning_rate": 1e-4}),
        "trl_orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.1, "learning_rate": 1e-4}),
        "trl_two_sets": (DPOTrainer, DPOConfig, {"learning_rate": 3e-4, "max_steps": 16}),
        "trl_moving_reference": (
            DPOTrainer,
            DPOConfig,
            {
                "learning_rate": 3e-4,
                "max_steps": 16,
                "sync_ref_model": True,
                "ref_model_sync_steps": 4,
                "ref_model_mixup_alpha": 0.9,
            },
        ),
    }
    for name, (trainer, config, options) in runs.items():
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        out = Path(work) / name
        arguments = config(
            output_dir=str(out),
            max_steps=options.pop("max_steps", STEPS),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=8,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=STEPS // EVALUATIONS,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=256,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            **options,
        )
        made = trainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=arguments,
            train_dataset=train,
            eval_dataset={"train": train.select(range(8)), "test": held_out} if name == "trl_two_sets" else held_out,
            processing_class=tokenizer,
            **({"ref_model": AutoModelForCausalLM.from_pretrained(model)} if "sync_ref_model" in options else {}),
        )
        made.train()
        kept = [
            {k: round(v, 7) if isinstance(v, float) else v for k, v in entry.items() if not k.endswith(TIMES)}
            for entry in made.state.log_history
        ]
        (LOGS / name).mkdir(parents=True, exist_ok=True)
        state = {"global_step": made.state.global_step, "log_history": kept}
        (LOGS / name / "trainer_state.json").write_text(json.dumps(state, indent=0) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
