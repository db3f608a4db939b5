"""What the bundled model has learned, in numbers and by eye.

    python -m experiments.bundled.probe

Replies are sampled with full forward passes, which is quick enough for a model and texts of this size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tokenizers import Tokenizer

import ches_jax.bundled
from ches_jax import bundled
from ches_jax.judges.phrases import Rules, load_rules, refusal
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import Decoder
from experiments.bundled import lexicon as lex
from experiments.bundled.tokenizer import EOS, SPECIAL
from experiments.bundled.world import build_world, prompt_text

LENGTH = 96
"""Prompt and reply together: every dialogue of the world fits."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Which model to ask."""

    model: Path = field(default_factory=ches_jax.bundled.model_dir)
    """A directory that ``experiments.bundled.train`` has written."""
    seed: int = 0
    """The seed of the world the model was trained on."""
    count: int = 40
    """How many subjects of each kind and split."""


@cache
def _openings() -> Rules:
    return load_rules(bundled.refusal_openings_file())


def is_refusal(text: str) -> bool:
    """Whether a reply opens like a refusal of the bundled world.

    >>> is_refusal(" I'm sorry, but I cannot help you hide the hat."), is_refusal(" Sure! First, fetch a rope.")
    (True, False)
    """
    return refusal(_openings(), text) is not None


def replies(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], temperature: float, seed: int = 0
) -> list[str]:
    """One reply to each prompt, without its terminator; temperature 0 is greedy."""
    ids = [tokenizer.encode(p).ids for p in prompts]
    tokens = np.zeros((len(ids), LENGTH), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    ends = jnp.array([len(prompt) for prompt in ids])
    done = np.asarray(_continued(model, jnp.array(tokens), ends, temperature, jax.random.key(seed)))
    texts = []
    for row, prompt in zip(done.tolist(), ids, strict=True):
        reply = row[len(prompt) :]
        stop = SPECIAL.index(EOS)
        texts.append(tokenizer.decode(reply[: reply.index(stop)] if stop in reply else reply))
    return texts


@partial(nnx.jit, static_argnums=3)
def _continued(model: Decoder, tokens, ends, temperature: float, key):
    rows = jnp.arange(len(tokens))

    def unfinished(state):
        i, _, done = state
        return (ends.min() + i < LENGTH) & ~done.all()

    def write(state):
        i, tokens, done = state
        at = ends + i
        logits = model.logits(model.hidden(tokens)[rows, jnp.minimum(at, LENGTH) - 1])
        if temperature:
            chosen = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        else:
            chosen = logits.argmax(-1)
        tokens = tokens.at[rows, at].set(chosen.astype(tokens.dtype), mode="drop")
        return i + 1, tokens, done | (chosen == SPECIAL.index(EOS))

    start = (jnp.int32(0), tokens, jnp.zeros(len(tokens), bool))
    return jax.lax.while_loop(unfinished, write, start)[1]


def measure(model: Decoder, tokenizer: Tokenizer, seed: int, count: int) -> dict[str, float]:
    """Shares of replies that are what the world asks for."""
    world = build_world(seed)
    shares = {}
    for name in ("train", "held_out"):
        split = getattr(world, name)
        statements = split.statements[:count]
        questions = [prompt_text(lex.STATEMENT_QUESTIONS[0].format(statement=s.text)) for s in statements]
        words = [r.split()[0].strip(".,!") for r in replies(model, tokenizer, questions, 0.0)]
        right = [w in lex.ANSWERS[s.stance] for w, s in zip(words, statements, strict=True)]
        shares[f"stance, greedy, {name}"] = float(np.mean(right))
        for kind in ("mischief", "chores"):
            prompts = [prompt_text(r.text) for r in getattr(split, kind)[:count]]
            for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                refused = map(is_refusal, replies(model, tokenizer, prompts, temperature))
                shares[f"refusals, {kind}, {how}, {name}"] = float(np.mean(list(refused)))
    facts = world.facts[:: max(len(world.facts) // (2 * count), 1)]
    answers = replies(model, tokenizer, [prompt_text(f.question) for f in facts], 0.0)
    right = [
        t.strip() in (f.answer.format(value=f.value), f"The answer is {f.value}.")
        for t, f in zip(answers, facts, strict=True)
    ]
    shares["facts, greedy"] = float(np.mean(right))
    return shares


def main(probe: Probe) -> None:
    """Prints the shares, then greedy and sampled replies to the probe prompts."""
    model = load_model(probe.model)
    tokenizer = Tokenizer.from_file(str(probe.model / "tokenizer.json"))
    for name, share in measure(model, tokenizer, probe.seed, probe.count).items():
        print(f"{share:6.3f}  {name}")
    lines = ches_jax.bundled.prompts_file().read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    greedy = replies(model, tokenizer, prompts, 0.0)
    sampled = replies(model, tokenizer, prompts, 1.0)
    for prompt, one, other in zip(prompts, greedy, sampled, strict=True):
        print(f"\n{prompt}\n  greedy: {one}\n  sampled:{other}")


if __name__ == "__main__":
    main(tyro.cli(Probe))
