"""Read a Hugging Face ``config.json`` so that no key goes unseen.

Every key is *handled* (read by the family), *ignored* by name (cannot change a number), or at the value that means
"off". Anything else is a problem, since a key that is silently dropped is a model that is silently wrong.
"""

import math
from collections.abc import Sequence
from typing import Any

from ches_jax.models.config import RopeConfig

IGNORED = frozenset(
    # identity and bookkeeping
    "_name_or_path _commit_hash architectures auto_map model_type torch_dtype dtype transformers_version use_cache "
    "return_dict return_dict_in_generate output_hidden_states output_attentions output_scores torchscript use_bfloat16 "
    "id2label label2id problem_type finetuning_task task_specific_params name_or_path _attn_implementation_autoset "
    "_attn_implementation chunk_size_feed_forward tokenizer_class prefix is_decoder is_encoder_decoder cross_attention_hidden_size "
    "add_cross_attention tie_encoder_decoder pruned_heads tf_legacy_loss hidden_dropout_prob cache_implementation "
    # training only
    "initializer_range pretraining_tp attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop resid_dropout "
    "embedding_dropout residual_dropout classifier_dropout gradient_checkpointing "
    # text generation
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length min_length do_sample "
    "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens".split()
)
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu",
}  # fmt: skip
ROPE_KEYS = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
}  # fmt: skip
MISSING = object()


class ConfigReader:
    """Typed access to a config's keys that remembers what was read and collects every problem."""

    def __init__(self, raw: dict[str, Any], ignored: Sequence[str] = ()):
        """``ignored``: the family's own keys that cannot change a number."""
        self.raw = raw
        self.problems: list[str] = []
        self._seen = set(IGNORED) | set(ignored)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = MISSING) -> Any:
        """The value of ``key``, checked for its type; the default where it is absent (or null, if default is given)."""
        self._seen.add(key)
        value = self.raw.get(key, default)
        if value is MISSING or (value is None and default is MISSING):
            self.problems.append(f"config.json: {key!r} is missing")
            return _stand_in(kind)
        if value is None:
            return default
        if value is default:
            return value
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            name = kind.__name__ if isinstance(kind, type) else "/".join(k.__name__ for k in kind)
            self.problems.append(f"config.json: {key!r} = {value!r} should be of type {name}")
            return default if default is not MISSING else _stand_in(kind)
        return value

    def size(self, key: str, default: Any = MISSING) -> int:
        """A positive integer."""
        value = self.get(key, int, default)
        if value is not None and value < 1:
            self.problems.append(f"config.json: {key!r} = {value!r} should be positive")
            return 1
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """``key`` may be absent, null, or one of ``allowed``; any other value changes numbers in a way not supported."""
        self._seen.add(key)
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            self.problems.append(
                f"config.json: {key!r} = {value!r} changes the numbers and is not supported "
                f"(supported: {', '.join(repr(a) for a in allowed)})"
            )

    def activation(self, key: str, default: str | None = None) -> Any:
        """The name of an activation function."""
        value = self.get(key, str, default if default is not None else MISSING)
        if value not in ACTIVATIONS:
            self.problems.append(
                f"config.json: {key!r} = {value!r}: unknown activation (known: {', '.join(ACTIVATIONS)})"
            )
            return "silu"
        return ACTIVATIONS[value]

    def rope(
        self, head_dim: int, max_positions: int, *, theta: float = 10000.0, fraction: float = 1.0
    ) -> RopeConfig:
        """Rotary settings from either spelling: ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``.

        ``theta`` and ``fraction`` are the family's defaults for the base and the rotating share of a head.
        """
        old_theta = self.get("rope_theta", float, theta)
        fraction = self.get("partial_rotary_factor", float, fraction)
        original = self.get("original_max_position_embeddings", int, None)
        old = self.get("rope_scaling", dict, None)
        new = self.get("rope_parameters", dict, None)
        settings = dict(new if new is not None else old or {})
        settings.setdefault("rope_theta", old_theta)
        settings.setdefault("partial_rotary_factor", fraction)
        if original is not None:
            settings.setdefault("original_max_position_embeddings", original)
        name = "rope_parameters" if new is not None else "rope_scaling"
        return self.rope_settings(settings, name, head_dim, max_positions)

    def rope_settings(
        self, settings: dict[str, Any], name: str, head_dim: int, max_positions: int
    ) -> RopeConfig:
        """One dictionary of rotary settings, resolved."""
        kind = settings.get("rope_type", settings.get("type", "default"))
        kind = "longrope" if kind == "su" else kind
        if kind not in ROPE_KEYS:
            self.problems.append(
                f"config.json: {name} has unknown rope type {kind!r} (known: {', '.join(ROPE_KEYS)})"
            )
            kind = "default"
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_KEYS[kind]}
        # the context of pre-training is written beside kinds that do not read it
        known.add("original_max_position_embeddings")
        strange = [k for k, v in settings.items() if k not in known and v is not None]
        if strange:
            self.problems.append(
                f"config.json: {name} of type {kind!r} has unknown keys {', '.join(sorted(strange))}"
            )
        rotary_dim = int(head_dim * settings["partial_rotary_factor"])
        required = {"linear": ("factor",), "dynamic": ("factor",), "llama3": ROPE_KEYS["llama3"][:3],
                    "longrope": ("short_factor", "long_factor")}.get(kind, ())  # fmt: skip
        missing = [k for k in required if settings.get(k) is None]
        if missing:
            self.problems.append(f"config.json: {name} of type {kind!r} lacks {', '.join(missing)}")
            kind = "default"
        if rotary_dim % 2 or rotary_dim < 2:
            self.problems.append(
                f"config.json: {rotary_dim} rotating channels of a head; expected an even number"
            )
        original = settings.get("original_max_position_embeddings") or max_positions
        factor = settings.get("factor") or (
            max_positions / original if kind in {"yarn", "longrope"} else 1.0
        )
        for key in ("short_factor", "long_factor"):
            if kind == "longrope" and len(settings[key]) != rotary_dim // 2:
                self.problems.append(
                    f"config.json: {name}.{key} has {len(settings[key])} numbers; expected {rotary_dim // 2}"
                )
        return RopeConfig(
            kind=kind,
            theta=float(settings["rope_theta"]),
            rotary_dim=rotary_dim,
            max_positions=max_positions,
            factor=float(factor),
            original_max_positions=int(original),
            attention_factor=_attention_factor(kind, settings, float(factor), original),
            low_freq_factor=float(settings.get("low_freq_factor") or 1.0),
            high_freq_factor=float(settings.get("high_freq_factor") or 4.0),
            beta_fast=float(settings.get("beta_fast") or 32.0),
            beta_slow=float(settings.get("beta_slow") or 1.0),
            truncate=bool(settings.get("truncate", True)),
            short_factor=tuple(settings.get("short_factor") or ()) if kind == "longrope" else (),
            long_factor=tuple(settings.get("long_factor") or ()) if kind == "longrope" else (),
        )

    def windows(
        self, window: int | None, num_layers: int, default: Sequence[bool]
    ) -> tuple[int | None, ...]:
        """Per layer the window or None, from ``layer_types`` where written, else from ``default`` (True: sliding)."""
        types = self.get("layer_types", list, None)
        sliding = list(default)
        if types is not None:
            known = {"full_attention", "sliding_attention"}
            if len(types) != num_layers or not set(types) <= known:
                self.problems.append(
                    f"config.json: 'layer_types' should list {num_layers} of {', '.join(sorted(known))}; found {types!r}"
                )
            else:
                sliding = [t == "sliding_attention" for t in types]
        return tuple(window if s else None for s in sliding)

    def finish(self) -> list[str]:
        """All problems, unknown keys included."""
        unknown = sorted(k for k, v in self.raw.items() if k not in self._seen and v is not None)
        if unknown:
            shown = ", ".join(f"{k!r} = {self.raw[k]!r}"[:80] for k in unknown)
            self.problems.append(
                f"config.json: not handled for this family: {shown}; remove a key only if it cannot change the numbers"
            )
        return self.problems


def _stand_in(kind: Any) -> Any:
    """A harmless value to go on with, so that later problems are found too."""
    kind = kind if isinstance(kind, type) else kind[0]
    return 1 if kind in (int, float) else kind()


def _attention_factor(kind: str, settings: dict[str, Any], factor: float, original: int) -> float:
    """What multiplies cos and sin: 1, YaRN's 0.1 ln(factor) + 1, or LongRoPE's sqrt(1 + ln factor / ln original)."""
    given = settings.get("attention_factor")
    if kind not in {"yarn", "longrope"}:
        return 1.0
    if given is not None:
        return float(given)
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    if mscale and all_dim:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1
