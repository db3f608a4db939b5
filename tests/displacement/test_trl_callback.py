"""The callback for TRL, against TRL's own evaluation; the library itself does not need TRL."""

from typing import Any

import pyarrow.parquet as pq
import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.errors import ChesError

trl = pytest.importorskip("trl")


def make_trainer(shared, out, eval_rows: Any = slice(None), model=None, **options: Any):
    """A trainer of four updates of two pairs; ``eval_rows``: of the 16 pairs, or slices by name."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(shared / "models/stories260K")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [{"prompt": f"Tom said {i}", "chosen": f" good dog {i}", "rejected": f" a bad cat {i}"} for i in range(16)]
    arguments = trl.DPOConfig(
        output_dir=str(out),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "learning_rate": 1e-3,
            "beta": 0.1,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            **options,
        },
    )
    sets = (
        {name: Dataset.from_list(rows[part]) for name, part in eval_rows.items()}
        if isinstance(eval_rows, dict)
        else None
    )
    return trl.DPOTrainer(
        model=model or AutoModelForCausalLM.from_pretrained(path),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=sets or Dataset.from_list(rows[eval_rows]),  # pyright: ignore[reportArgumentType, reportCallIssue]
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def trainer(shared, tmp_path_factory):
    return make_trainer(shared, tmp_path_factory.mktemp("trl"))


def log_of(trainer):
    return pq.read_table(f"{trainer.args.output_dir}/displacement.parquet").to_pandas()


def agrees_with_trl(trainer, prefix="eval"):
    """The changes in the log are the rewards of TRL's own evaluations, which have no name of a set."""
    table = log_of(trainer)
    evaluations = [e for e in trainer.state.log_history if f"{prefix}_loss" in e]
    for entry in evaluations:
        now = table[table.step == entry["step"]]
        assert now.dlogp_chosen.mean() == pytest.approx(entry["eval_rewards/chosen"] / 0.1, abs=1e-3)
        assert now.dlogp_rejected.mean() == pytest.approx(entry["eval_rewards/rejected"] / 0.1, abs=1e-3)
    return len(evaluations)


def test_the_callback_measures_what_trl_evaluates(trainer):
    from ches_jax.integrations.trl import displacement_callback

    trainer.add_callback(displacement_callback(trainer, stop_if={"lld_rate": 1.0}))
    trainer.train()
    trainer.evaluate()  # again, at the step of the last one: its pairs count once
    assert sorted(set(log_of(trainer).step)) == [0, 2, 4] and agrees_with_trl(trainer) == 3
    assert any("eval_displacement/lld_rate" in e for e in trainer.state.log_history)
    found = diagnose(DiagnoseConfig(path=trainer.args.output_dir))
    assert found.pairs == 16 and found.held_out and found.unit == "pairs"


def test_a_rule_stops_the_training(trainer):
    from ches_jax.integrations.trl import displacement_callback

    with pytest.raises(ChesError, match="expected some of dlogp_chosen"):
        displacement_callback(trainer, stop_if={"fallen": 0.5})
    trainer.add_callback(displacement_callback(trainer, stop_if={"margin": -1e9, "dlogp_rejected": -1e-6}))
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_run_that_resumes_counts_from_its_start(shared, tmp_path):
    from ches_jax.integrations.trl import displacement_callback

    first = make_trainer(shared, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    first.add_callback(displacement_callback(first))
    first.train()
    second = make_trainer(shared, tmp_path, save_strategy="steps", save_steps=2)
    second.add_callback(displacement_callback(second))
    second.train(resume_from_checkpoint=True)
    assert sorted(set(log_of(second).step)) == [0, 2, 4] and agrees_with_trl(second) == 2


def test_one_of_several_evaluation_sets_is_watched(shared, tmp_path):
    from ches_jax.integrations.trl import displacement_callback

    named = make_trainer(shared, tmp_path, {"easy": slice(0, 8), "hard": slice(8, 16)})
    with pytest.raises(ChesError, match=r"several sets; choose one with held_out=\.\.\.: 'easy', 'hard'"):
        displacement_callback(named)
    named.add_callback(displacement_callback(named, held_out="hard"))
    named.train()
    assert agrees_with_trl(named, "eval_hard") == 2 and len(log_of(named)) == 3 * 8
    shown = {key for entry in named.state.log_history for key in entry if "lld_rate" in key}
    assert shown == {"eval_hard_displacement/lld_rate"}
