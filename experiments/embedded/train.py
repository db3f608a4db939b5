"""Trains the embedded model on the world, from nothing, and writes it as a Hugging Face directory.

    python -m experiments.embedded.make --seed 0 --stage model

Next-token cross-entropy on the responses, AdamW with warm-up and cosine decay, float32; the weights are
rounded to bfloat16 once, at the end.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tokenizers import Tokenizer

from ches_jax.hf.export import write_config, write_weights
from ches_jax.models.decoder import Decoder, named_parameters
from ches_jax.models.families import decoder_config, family_of
from ches_jax.models.save import stored_tensors
from ches_jax.models.visibility import Visibility
from experiments.embedded.packing import Rows, batches, documents
from experiments.embedded.tokenizer import BOS, EOS, MODEL_MAX_LENGTH, PAD, SPECIAL, VOCABULARY
from experiments.embedded.world import build_world, dialogues

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
    rows: int = 32
    length: int = 128
    peak: float = 4e-3
    warmup: int = 75
    weight_decay: float = 0.1
    clip: float = 1.0


def train_and_export(seed: int, directory: Path, recipe: Recipe | None = None) -> None:
    """Trains on the world of ``seed``; ``directory`` already holds the tokenizer."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    export(train(seed, tokenizer, recipe or Recipe()), directory)


def train(seed: int, tokenizer: Tokenizer, recipe: Recipe) -> Decoder:
    """The trained decoder, in float32."""
    model = Decoder(decoder_config(HF_CONFIG, "HF_CONFIG"), rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model)
    optimizer = make_optimizer(recipe)
    state = optimizer.init(params)
    step = make_step(graph, optimizer)
    # more dialogues than are needed: the stream ends when the steps are done
    docs = documents(dialogues(build_world(seed), recipe.steps * recipe.rows * 16), tokenizer)
    began = time.perf_counter()
    for i, rows in enumerate(islice(batches(docs, recipe.rows, recipe.length), recipe.steps), 1):
        params, state, loss = step(params, state, rows)
        if i % 100 == 0 or i == recipe.steps:
            print(f"step {i}: loss {float(loss):.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    return nnx.merge(graph, params)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW, clipped; matrices decay, norm weights do not."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.peak, recipe.warmup, recipe.steps, recipe.peak / 50)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay, mask=decays),
    )


def decays(params: Any) -> Any:
    """True where weight decay applies: not to norm weights, stacked over layers or not."""
    return jax.tree.map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)


def make_step(graph: Any, optimizer: optax.GradientTransformation) -> Any:
    """The jitted training step: (params, state, rows) -> (params, state, loss)."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rows: Rows) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: response_loss(nnx.merge(graph, p), rows))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def response_loss(model: Decoder, rows: Rows) -> jax.Array:
    """Mean cross-entropy, in nats, over the tokens of the responses."""
    tokens, start = jnp.asarray(rows.tokens), jnp.asarray(rows.start)
    none = jnp.zeros_like(start)
    hidden = model.hidden(tokens, jnp.asarray(rows.positions), Visibility(none, none, start))
    targets = jnp.roll(tokens, -1, axis=1)  # the last column is never learned
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)
    weights = jnp.asarray(rows.learned, losses.dtype)
    return (losses * weights).sum() / weights.sum()


def export(model: Decoder, directory: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors in bfloat16 beside the tokenizer."""
    params = named_parameters(model)
    rules = family_of(HF_CONFIG, "HF_CONFIG").name_rules(params, model.config)
    write_weights(directory, stored_tensors(rules, params, model.config, {}, "bfloat16"))
    write_config(directory, HF_CONFIG)
    ids = {k: v for k, v in HF_CONFIG.items() if k.endswith("_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
