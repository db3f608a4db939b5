"""Trains the bundled model on the world, from nothing, and writes it as a Hugging Face directory.

    python -m experiments.bundled.make --seed 0 --stage model

The library's trainer with ``--loss sft``: cross-entropy per token of the responses, AdamW with warm-up and cosine
decay, float32; the weights are rounded to bfloat16 once, at the end.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from ches_jax.hf.directory import SINGLE
from ches_jax.hf.export import copy_tokenizer, write_config
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.checkpoint.save import save_pretrained
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import decoder_config
from ches_jax.train.config import TrainConfig
from ches_jax.train.loop import train as run
from experiments.bundled.tokenizer import BOS, EOS, MODEL_MAX_LENGTH, PAD, SPECIAL, VOCABULARY
from experiments.bundled.world import build_world, dialogues

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": MODEL_MAX_LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    # untied, so that the geometry of the unembedding is its own
    "tie_word_embeddings": False,
    "pad_token_id": SPECIAL.index(PAD),
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the model is trained."""

    steps: int = 900
    dialogues: int = 124
    """Of an update: what fills 32 rows of 128 tokens."""
    peak: float = 4e-3
    warmup: int = 75
    weight_decay: float = 0.1
    clip: float = 1.0


def train_and_export(seed: int, directory: Path, recipe: Recipe | None = None) -> None:
    """Trains on the world of ``seed``; ``directory`` already holds the tokenizer."""
    with tempfile.TemporaryDirectory() as work:
        export(train(seed, directory, Path(work), recipe or Recipe()), directory)


def train(seed: int, tokenizer: Path, work: Path, recipe: Recipe, *, quiet: bool = False) -> Path:
    """The directory of the trained model, in float32; everything lies below ``work``, the tokenizer is copied there."""
    start, data = work / "start", work / "dialogues.jsonl"
    save_pretrained(Decoder(decoder_config(HF_CONFIG, "HF_CONFIG"), rngs=nnx.Rngs(seed)), start, config=HF_CONFIG)
    copy_tokenizer(tokenizer, start)
    with data.open("w", encoding="utf-8") as file:
        for d in dialogues(build_world(seed), recipe.steps * recipe.dialogues):
            file.write(json.dumps({"prompt": d.prompt, "completion": d.response}) + "\n")
    out = run(
        TrainConfig(
            model=str(start),
            pairs=str(data),
            out=str(work / "run"),
            seed=seed,
            loss="sft",
            watch=64,
            optimizer="adamw",
            optimizer_args={"b2": 0.98, "weight_decay": recipe.weight_decay},
            clip=recipe.clip,
            lr=recipe.peak,
            schedule="cosine",
            warmup=recipe.warmup,
            batch_size=recipe.dialogues,
            steps=recipe.steps,
            template="none",
        ),
        quiet=quiet,
    )
    return out / "model"


def export(trained: Path, directory: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors in bfloat16 beside the tokenizer."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "model"
        save_pretrained(load_model(trained), out, like=trained, dtype="bfloat16")
        shutil.copyfile(out / SINGLE, directory / SINGLE)
    write_config(directory, HF_CONFIG)
    ids = {k: v for k, v in HF_CONFIG.items() if k.endswith("_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
