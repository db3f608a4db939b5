"""Configs that no row lists: every key of a family in turn, random ones of several; against transformers in float64.

A key that transformers reads and we neither read nor refuse is a model that is silently wrong; a key that we read and
transformers does not is one too.
"""

import copy
import inspect
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.errors import CheckpointError
from ches_jax.models.attention.dense import dense
from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.config import DecoderConfig, RopeConfig
from ches_jax.models.families.registry import FAMILIES, decoder_config
from ches_jax.models.rope import frequencies

from .rows import LLAMA3, LONGROPE, ROPES, ROWS, YARN, Row
from .test_parity import jax_outputs, relative
from .theirs import IDS, Theirs, theirs, transformers

ALL = [pytest.param(row, id=row.family) for row in ROWS]
ABOUT = {
    "model_type", "architectures", "transformers_version", "dtype", "id2label", "label2id", "num_labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "to_dict", "use_cache",
}  # fmt: skip
"""What a config says of itself, and what a call is to return."""
WITHOUT_EFFECT = {
    "qwen3_moe": {"use_sliding_window": "its window is longer than the sequence"},
    "qwen2_moe": {
        "use_sliding_window": "its window is longer than the sequence",
        "intermediate_size": "of dense layers, which the row does not have",
    },
    "qwen3_next": {"intermediate_size": "of dense layers, which the row does not have"},
    "qwen3_5_moe_text": {"intermediate_size": "of dense layers, which there never are"},
    "glm4_moe": {"num_nextn_predict_layers": "of layers that are passed over, here and there"},
    "deepseek_v3": {"num_nextn_predict_layers": "of layers that are passed over, here and there"},
    "gpt_oss": {"swiglu_limit": "beyond every gate"},
}
"""Keys that we read and that change nothing in the row's model."""
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "quick_gelu", "relu2", "mish")
SIZES: dict[str, tuple[int, ...]] = {
    "vocab_size": (103, 160), "hidden_size": (54, 72, 96), "num_hidden_layers": (1, 2, 4, 5, 7),
    "num_attention_heads": (3, 6, 9, 12), "num_key_value_heads": (1, 3, 6, 9), "head_dim": (6, 8, 12, 16),
    "n_layer": (1, 4), "n_embd": (54, 72), "n_head": (3, 6), "n_positions": (40, 64),
    "max_position_embeddings": (48, 99),
}  # fmt: skip
"""Sizes that go together often enough."""


def raw_of(row: Row) -> dict[str, Any]:
    return {"model_type": row.family, **copy.deepcopy(row.base)}


def keys_of(row: Row) -> list[str]:
    """The fields of the config class, and what the family's code reads besides."""
    cls = getattr(transformers, row.config)
    made = cls.from_dict(raw_of(row)).to_dict()
    module = cls.__module__.replace("configuration", "modeling")
    __import__(module)
    asked = re.findall(r'kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"', inspect.getsource(cls))
    asked += re.findall(r"\bconfig\.(\w+)", inspect.getsource(sys.modules[module]))
    return sorted(k for k in {*made, *asked, *row.base} - ABOUT if not k.startswith("_"))


def others(key: str, value: Any) -> list[Any]:
    """Values of a key other than ``value``, near and far."""
    if isinstance(value, bool):
        return [not value]
    if "act" in re.split(r"[_]", key) or "activation" in key:
        return [a for a in ACTIVATIONS if a != value]
    if isinstance(value, int):
        return [n for n in (value + 1, value - 1, 2 * value, value // 2, 0, 1, 3) if n != value and n < 300]
    if isinstance(value, float):
        return [value * 1.7 + 0.1, value / 3]
    if isinstance(value, list):
        return [value[::-1], value[1:] + value[:1]] if value else [[0], [1]]
    if isinstance(value, dict):
        return [{**value, k: new} for k, old in value.items() for new in others(k, old)]
    return ["nonsense"] if isinstance(value, str) else [1, 2, 7, 0.5, True, [1]]


def ours(raw: dict[str, Any]) -> DecoderConfig | None:
    """What we make of a config; None where it is refused."""
    try:
        return decoder_config(copy.deepcopy(raw))
    except CheckpointError:
        return None


def meaning(config: DecoderConfig) -> tuple[Any, ...]:
    """What a config computes: of rotations the frequencies themselves, which several settings can give.

    One pair of channels turns at the same rate whatever the base; a ramp between two channels touches neither; and the
    context length counts only where something depends on it.
    """

    def of_rope(rope: RopeConfig | None) -> Any:
        if rope is None or rope.length_threshold is not None:
            return rope
        rates = tuple(f"{rate:.12e}" for rate in frequencies(rope))
        return rope.rotary_dim, rope.neighbours, rope.attention_factor, rates

    length = config.max_positions if config.rope is None else 0
    rest = replace(config, max_positions=length, rope=None, local_rope=None)
    return rest, of_rope(config.rope), of_rope(config.local_rope)


def test_every_key_of_a_config_class_is_known():
    """Read, or ignored by name: then a value that a file has is never passed over by accident."""
    unknown = {}
    for row in ROWS:
        written = getattr(transformers, row.config).from_dict(raw_of(row)).to_dict()
        reader = ConfigReader({**written, "model_type": row.family})
        FAMILIES[row.family].read_config(reader)
        reader.finish()
        if left := {k for k in written if k not in reader._seen} - ABOUT:
            unknown[row.family] = left
    assert not unknown


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL)
def test_a_key_changes_ours_where_it_changes_theirs(row: Row):
    raw = raw_of(row)
    base, mine = theirs(row.config, raw), ours(raw)
    assert mine is not None
    full = getattr(transformers, row.config).from_dict(raw).to_dict()
    wrong = []
    for key in keys_of(row):
        for value in others(key, raw.get(key, full.get(key))):
            changed = {**raw, key: value}
            config = ours(changed)
            if config is None:
                continue
            try:
                other = theirs(row.config, changed)
            except Exception:  # what transformers cannot make means nothing to it
                continue
            same = meaning(config) == meaning(mine)
            if same == other.differs(base) and key not in WITHOUT_EFFECT.get(row.family, {}):
                wrong.append(f"{key} = {value!r}: " + ("only theirs changes" if same else "only ours changes"))
    assert not wrong, "\n".join(wrong)


def ropes_of(row: Row) -> list[dict[str, Any]]:
    """Rotary settings for a family: of one kind, or of one for each type of layer."""
    base = row.base.get("rope_parameters") or {}
    own = {k: v for k, v in base.items() if k not in YARN}
    kinds = [{"rope_type": "default", "rope_theta": 700.0}, LLAMA3, YARN, LONGROPE]
    kinds += [r["rope_parameters"] for r in ROPES.values()]
    kinds += [{**k, "partial_rotary_factor": 0.5} for k in kinds]
    by_type = [{"full_attention": k, "sliding_attention": {"rope_type": "default", "rope_theta": 90.0}} for k in kinds]
    return [{**own, **k} for k in kinds] + by_type


def variants(row: Row, seed: int) -> Iterator[dict[str, Any]]:
    """Random configs of the family, without end."""
    rng = np.random.default_rng([zlib.crc32(row.family.encode()), seed])
    raw = raw_of(row)
    full = getattr(transformers, row.config).from_dict(raw).to_dict()
    options = {k: SIZES.get(k) or others(k, raw.get(k, full.get(k))) for k in keys_of(row)}
    options = {k: v for k, v in options.items() if v and "token_id" not in k}
    named = [n for n in options if n in SIZES or n in row.base or any(n in v for v in row.variants.values())]
    listed = {n: sorted(set(full[n])) for n in ("layer_types", "no_rope_layers", "mlp_layer_types") if full.get(n)}
    rest = sorted(set(options) - set(named))
    while True:
        chosen = [*rng.choice(named, min(4, len(named)), replace=False), *rng.choice(rest, 2, replace=False)]
        made = {k: options[k][rng.integers(len(options[k]))] for k in map(str, chosen)}
        if rng.integers(2):
            kinds = ropes_of(row)
            made["rope_parameters"] = kinds[rng.integers(len(kinds))]
        layers = made.get("num_hidden_layers", full.get("num_hidden_layers"))
        for name, values in listed.items():
            made[name] = [values[rng.integers(len(values))] for _ in range(layers)]
        yield {**raw, **made}


def variant(row: Row, seed: int) -> tuple[dict[str, Any], Theirs]:
    """The first random config that both can make."""
    for raw, _ in zip(variants(row, seed), range(400), strict=False):
        if ours(raw) is not None:
            try:
                return raw, theirs(row.config, raw)
            except Exception:  # sizes that do not go together
                continue
    raise AssertionError("no variant that both can make")


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("row", ALL)
def test_random_variants_are_exact(row: Row, seed: int, tmp_path: Path):
    raw, expected = variant(row, seed)
    said = {k: v for k, v in raw.items() if v != row.base.get(k)}
    expected.model.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float64")
    hidden, logits = jax_outputs(model, jnp.asarray(IDS, jnp.int32), dense)
    error = max(relative(hidden, expected.hidden), relative(logits, expected.logits))
    print(row.family, seed, f"{error:.1e}", said)
    assert error < 1e-10, said
