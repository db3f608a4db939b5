"""Makes ``logs/tunix_events``: what tunix's own ``DPOTrainer`` writes, TensorBoard events; a minute on two cores.

    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7 transformers
    tunix/bin/python tests/displacement/make_tunix_log.py TOKENIZER PAIRS.jsonl WORK

tunix is no dependency of the tests: the event file is committed, and ``expected.json`` says what it holds.
"""

import json
import shutil
import sys
from pathlib import Path

LOGS = Path(__file__).parent / "logs"
PROMPT, RESPONSE, ROWS, STEPS, EVERY = 64, 48, 4, 40, 4


def main(tokenizer: str, data: str, work: str) -> None:
    """Trains a small random Llama on short pairs, evaluates it on others, and keeps the event file."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from transformers import AutoTokenizer
    from tunix.models.llama3 import model as llama  # pyright: ignore[reportMissingImports]
    from tunix.sft.dpo import dpo_trainer as dpo  # pyright: ignore[reportMissingImports]
    from tunix.sft.metrics_logger import MetricsLoggerOptions  # pyright: ignore[reportMissingImports]

    words = AutoTokenizer.from_pretrained(tokenizer)

    def ids(text: str, length: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
        found = words.encode(text, add_special_tokens=False)[:length]
        padding = [0] * (length - len(found))
        marks = [1] * len(found)
        row, mask = (padding + found, padding + marks) if left else (found + padding, marks + padding)
        return np.array(row, np.int32), np.array(mask, np.int32)

    with open(data, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [r for r in rows if len(words.encode(r["prompt"])) <= PROMPT]

    def batches(first: int, count: int) -> list[object]:
        made = []
        for start in range(first, first + count * ROWS, ROWS):
            part = rows[start : start + ROWS]
            columns = {}
            for name, length in (("prompt", PROMPT), ("chosen", RESPONSE), ("rejected", RESPONSE)):
                found = [ids(r[name], length, name == "prompt") for r in part]
                columns[f"{name}_ids"], columns[f"{name}_mask"] = (np.stack(x) for x in zip(*found, strict=True))
            made.append(dpo.TrainingInput(**columns))
        return made

    sizes = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = llama.ModelConfig(vocab_size=len(words), rope_theta=1_000_000, norm_eps=1e-5, weight_tying=True, **sizes)

    def built() -> llama.Llama3:
        model = llama.Llama3(config, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
        return model

    folder = Path(work).resolve() / "tunix"
    trainer = dpo.DPOTrainer(
        model=built(),
        ref_model=built(),
        optimizer=optax.adamw(1e-3),
        training_config=dpo.DPOTrainingConfig(
            eval_every_n_steps=EVERY,
            max_steps=STEPS,
            beta=0.1,
            metrics_logging_options=MetricsLoggerOptions(log_dir=str(folder), flush_every_n_steps=1),
        ),
    )
    trainer.train(batches(0, STEPS), batches(STEPS * ROWS, 4))
    out = LOGS / "tunix_events"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (events,) = folder.rglob("events.out.tfevents.*")
    shutil.copy(events, out / "events.out.tfevents.1000000000.host.1.1")


if __name__ == "__main__":
    main(*sys.argv[1:4])
