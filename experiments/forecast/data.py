"""The pairs of the experiment: short ones, one for each prompt, split into SFT, DPO, probes and test."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.forecast.config import ForecastScale
from experiments.framework.item import Work
from experiments.framework.training import write_rows

SPLIT_SEED = 7
PARTS = ("sft", "train", "probes", "test", "held")


def pairs_file(work: Work, part: str) -> Path:
    """The pairs of a part; ``held`` are probes and test together."""
    return work.folder(f"{part}.jsonl")


def write_pool(work: Work, seed: int) -> Path:
    """A draw of as many of SFT's pairs as DPO trains on: the pool that the filters of a seed choose from."""
    config: ForecastScale = work.config
    lines = pairs_file(work, "sft").read_text(encoding="utf-8").splitlines()
    drawn = np.random.default_rng((SPLIT_SEED, seed)).permutation(len(lines))[: config.train]
    return write_rows(pairs_file(work, f"pool-{seed}"), (json.loads(lines[i]) for i in sorted(drawn)))


def write_pairs(work: Work) -> dict[str, Any]:
    """Draw the pairs and write each part."""
    from ches_jax import bundled
    from ches_jax.data.sources import open_pairs
    from ches_jax.data.tokenize import load_tokenizer
    from ches_jax.errors import DataError
    from ches_jax.hf.directory import resolve

    config: ForecastScale = work.config
    assert config.pairs is not None and config.model is not None
    source = open_pairs(bundled.located(config.pairs, bundled.pairs_file), None, {})
    tokenizer = load_tokenizer(resolve(config.model))
    usable, seen = [], set()
    for row in source:
        texts = {name: row.content.get(name) for name in ("prompt", "chosen", "rejected")}
        if not all(isinstance(t, str) and t for t in texts.values()) or texts["prompt"] in seen:
            continue
        tokens = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts.values())  # type: ignore
        if texts["chosen"] == texts["rejected"] or tokens > config.longest:
            continue
        seen.add(texts["prompt"])
        prompt = str(texts["prompt"])
        ends = prompt[-1].isspace() or prompt.endswith(":")
        usable.append({**texts, "prompt": prompt if ends else prompt + config.ending})
    wanted = config.tuned_on + config.probes + config.test
    if len(usable) < wanted:
        raise DataError(f"{source.name}: {len(usable)} pairs of at most {config.longest} tokens, {wanted} are needed")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(usable))[:wanted]
    rows = [usable[i] for i in order]
    held = rows[config.tuned_on :]
    parts = (rows[: config.tuned_on], rows[: config.train], held[: config.probes], held[config.probes :], held)
    for name, some in zip(PARTS, parts, strict=True):
        write_rows(pairs_file(work, name), some)
    return {"found": len(usable), **{name: len(some) for name, some in zip(PARTS, parts, strict=True)}}
