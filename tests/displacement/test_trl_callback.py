"""The callback for TRL, against TRL's own evaluation; the library itself does not need TRL."""

import pyarrow.parquet as pq
import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.errors import ChesError

trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def trainer(shared, tmp_path_factory):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(shared / "models/stories260K")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [{"prompt": f"Tom said {i}", "chosen": f" good dog {i}", "rejected": f" a bad cat {i}"} for i in range(16)]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        learning_rate=1e-3,
        beta=0.1,
        gradient_checkpointing=False,
        logging_steps=1,
    )
    model = AutoModelForCausalLM.from_pretrained(path)
    data = Dataset.from_list(rows)
    return trl.DPOTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )


def test_the_callback_measures_what_trl_evaluates(trainer):
    from ches_jax.integrations.trl import displacement_callback

    trainer.add_callback(displacement_callback(trainer, stop_if={"lld_rate": 2.0}))
    trainer.train()
    table = pq.read_table(f"{trainer.args.output_dir}/displacement.parquet").to_pandas()
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert sorted(set(table.step)) == [0, 2, 4] and len(evaluations) == 2
    for entry in evaluations:
        now = table[table.step == entry["step"]]
        assert now.dlogp_chosen.mean() == pytest.approx(entry["eval_rewards/chosen"] / 0.1, abs=1e-3)
        assert now.dlogp_rejected.mean() == pytest.approx(entry["eval_rewards/rejected"] / 0.1, abs=1e-3)
    assert any("eval_displacement/lld_rate" in e for e in trainer.state.log_history)
    found = diagnose(DiagnoseConfig(path=trainer.args.output_dir))
    assert found.pairs == 16 and found.held_out and found.unit == "pairs"


def test_a_rule_stops_the_training(trainer):
    from ches_jax.integrations.trl import displacement_callback

    with pytest.raises(ChesError, match="expected some of dlogp_chosen"):
        displacement_callback(trainer, stop_if={"fallen": 0.5})
    trainer.add_callback(displacement_callback(trainer, stop_if={"lld_rate": -1.0}))
    trainer.train()
    assert trainer.state.global_step == 2
