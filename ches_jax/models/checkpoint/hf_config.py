"""Read a Hugging Face ``config.json`` so that no key goes unseen.

Every key is *handled* (read by the family), *ignored* by name (cannot change a number), or at the value that means
"off". Of the others, those whose name speaks of arithmetic are a problem, since such a key silently dropped is a model
that is silently wrong; the rest are keys that no code of the model reads, that of transformers neither, and are named.
"""

import math
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from ches_jax.models.config import RopeConfig, RopeKind


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


IGNORED = _words(
    # identity and bookkeeping
    "_name_or_path _commit_hash architectures auto_map model_type torch_dtype dtype transformers_version use_cache "
    "return_dict return_dict_in_generate output_hidden_states output_attentions output_scores output_logits "
    "torchscript use_bfloat16 "
    "id2label label2id problem_type finetuning_task task_specific_params name_or_path _attn_implementation_autoset "
    "_attn_implementation chunk_size_feed_forward tokenizer_class prefix num_labels _num_labels is_decoder "
    "cross_attention_hidden_size tf_legacy_loss cache_implementation transformers.js_config unsloth_fixed "
    "unsloth_version logits_to_keep num_logits_to_keep n_positions "
    # read by hf.quantised
    "quantization_config "
    # training only
    "initializer_range pretraining_tp attention_dropout attention_probs_dropout_prob hidden_dropout "
    "hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop resid_dropout embedding_dropout residual_dropout "
    "classifier_dropout gradient_checkpointing neftune_noise_alpha dpo_beta tensor_parallel_degree "
    # text generation
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length min_length do_sample "
    "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens"
)
OFF: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "transformers_weights": ("model.safetensors",),
}
"""Keys of any family that are supported only where they change nothing."""
NUMBER_WORDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_words("scale scales scaling scaled multiplier factor ratio pct percent fraction"), (1,)),
    **dict.fromkeys(
        _words(
            "bias window sliding softcap softcapping cap clip alibi chunk residual quantization parallel moe expert "
            "experts router lora adapter sparse sparsity pruned skip"
        ),
        (False, 0),
    ),
    **dict.fromkeys(
        _words(
            "logit logits attention attn rotary rope rotate theta position positions positional norm layernorm rms eps "
            "epsilon qk qkv kv mask causal activation act gate gated tie tied embed embedding embeddings layer layers "
            "alpha beta gamma temperature weights scoring score routing route gating topk"
        ),
        (),
    ),
}
"""Words in the name of a key that changes numbers -> the values at which it does not."""
NO_NUMBER_WORDS = _words("implementation flash fused dropout init initializer initialization loss kernel")
"""Words that make a key harmless in spite of the others: which kernel computes, or what training draws."""
COPIES = (
    _words("rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon rms_norm_epsilon"),
    _words("num_hidden_layers num_layers n_layers n_layer"),
    _words("rope_theta rope_base rotary_base rotary_emb_base"),
)
"""Names of one number in configs of several families: one that is not read is harmless where it repeats one that is."""
LARGEST = 2**31 - 1
"""The largest size: positions and rows are indexed by 32 bits."""
MOST_LAYERS = 4096
"""Several times the deepest published decoder; a file that asks for more asks for memory, not for a model."""
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}
ROPE_KEYS: dict[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
    "proportional": ("factor",),
}
ROPE_UNREAD = frozenset({"finetuned", "mrope_section", "mrope_interleaved"})
"""Keys of rotary settings that change nothing: a remark on the training, and how positions of pictures are shared out,
which in a text are all the same."""
RETIRED_ROPE_NAMES = {"su": "longrope"}
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ROPE_VALUE = "positive number (or list of them, or true/false where the key asks for that)"
MISSING = object()


class Sizes(TypedDict):
    """The sizes every family has."""

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int


class ConfigReader:
    """Typed access to a config's keys that remembers what was read and collects every problem."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = raw
        self.problems: list[str] = []
        self._seen = set(IGNORED)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = MISSING) -> Any:
        """The value of ``key``, checked for its type; the default where it is absent (or null, if default is given)."""
        self._seen.add(key)
        value = self.raw.get(key, default)
        if value is MISSING or (value is None and default is MISSING):
            self.problems.append(f"config.json: {key!r} is missing")
            return _placeholder(kind)
        if value is None:
            return default
        if value is default:
            return value
        if isinstance(value, int) and not isinstance(value, bool) and kind is float and abs(value) <= LARGEST**2:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            name = kind.__name__ if isinstance(kind, type) else "/".join(k.__name__ for k in kind)
            self.problems.append(f"config.json: {key!r} = {_short(value)} should be of type {name}")
            return default if default is not MISSING else _placeholder(kind)
        if isinstance(value, float) and not math.isfinite(value):
            self.problems.append(f"config.json: {key!r} = {value!r} should be a finite number")
            return default if default is not MISSING else _placeholder(kind)
        return value

    def size(self, key: str, default: Any = MISSING, most: int = LARGEST) -> Any:
        """A positive integer up to ``most``, or the default where that is None."""
        value = self.get(key, int, default)
        if value is not None and value < 1:
            self.problems.append(f"config.json: {key!r} = {_short(value)} should be positive")
            return 1
        if value is not None and value > most:
            self.problems.append(f"config.json: {key!r} = {_short(value)} should be at most {most}")
            return 1
        return value

    def layers(self, key: str) -> int:
        """The number of layers."""
        return self.size(key, most=MOST_LAYERS)

    def nullable(self, key: str, kind: type, absent: Any) -> Any:
        """The value of ``key`` where null means "off": ``absent`` stands in only where the key is not written."""
        return self.get(key, kind, None) if key in self.raw else self.get(key, kind, absent)

    def nullable_size(self, key: str, absent: int | None) -> int | None:
        """``nullable`` for a positive integer."""
        return self.size(key, None) if key in self.raw else self.size(key, absent)

    def sizes(self, *, vocab_size: Any = MISSING, num_heads: Any = MISSING, mlp_width: Any = MISSING) -> Sizes:
        """Vocabulary, width, MLP width, layers and heads, under the names most families use.

        Nothing stands in for a missing size, but where a family's published configs leave it out.
        """
        return Sizes(
            vocab_size=self.size("vocab_size", vocab_size),
            width=self.size("hidden_size"),
            mlp_width=self.size("intermediate_size", mlp_width),
            num_layers=self.layers("num_hidden_layers"),
            num_heads=self.size("num_attention_heads", num_heads),
        )

    def head_dim(self, sizes: Sizes) -> int:
        """``head_dim``, by default the width divided by the heads."""
        return self.size("head_dim", max(sizes["width"] // sizes["num_heads"], 1))

    def kv_heads(self, sizes: Sizes, absent: int | None = None) -> int:
        """Key/value heads: ``absent`` where the key is not written, as many as query heads where it is null."""
        return self.nullable_size("num_key_value_heads", absent) or sizes["num_heads"]

    def positive(self, key: str, default: float) -> float:
        """A number above zero."""
        value = self.get(key, float, default)
        if value <= 0:
            self.problems.append(f"config.json: {key!r} = {value!r} should be positive")
        return value if value > 0 else default

    def ignore(self, *keys: str) -> None:
        """The family's own keys that cannot change a number."""
        self._seen.update(keys)

    def must_be(self, key: str, *allowed: Any) -> None:
        """``key`` may be absent, null, or one of ``allowed``; any other value would change numbers unsupported."""
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
        self,
        head_dim: int,
        max_positions: int,
        *,
        theta: float = 10000.0,
        theta_key: str = "rope_theta",
        fraction: float | None = None,
        fraction_key: str = "partial_rotary_factor",
        original: int | None = None,
        rename: Mapping[str, str] = RETIRED_ROPE_NAMES,
        own: Collection[str] = (),
    ) -> RopeConfig:
        """Rotary settings from either spelling: ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``.

        Args:
          head_dim: channels of a head.
          max_positions: the context length.
          theta: the family's default base.
          theta_key: the family's name for the base outside the dictionary.
          fraction: the family's default for the rotating share of a head; None: all of it, and nothing else is known.
          fraction_key: the family's name for the share outside the dictionary.
          original: the family's default for ``original_max_position_embeddings``.
          rename: old names of rope types.
          own: keys of the dictionary that the family reads itself.
        """
        outside = {
            "rope_theta": self.get(theta_key, float, theta),
            "partial_rotary_factor": self.get(fraction_key, float, 1.0 if fraction is None else fraction),
        }
        old, new = self.get("rope_scaling", dict, None), self.get("rope_parameters", dict, None)
        name = "rope_scaling" if old else "rope_parameters"
        settings = outside | {k: v for k, v in (old or new or {}).items() if v is not None and k not in own}
        # written beside the dictionary it is the one that counts, as in transformers
        settings["original_max_position_embeddings"] = self.size(
            "original_max_position_embeddings", original
        ) or settings.get("original_max_position_embeddings")
        if fraction is None and settings["partial_rotary_factor"] != 1:
            self.problems.append(
                f"config.json: 'partial_rotary_factor' = {settings['partial_rotary_factor']!r} is not supported for "
                "this family, whose heads rotate whole"
            )
            settings["partial_rotary_factor"] = 1.0
        return self.rope_settings(settings, name, head_dim, max_positions, rename)

    def ropes_by_layer_type(
        self, head_dims: Mapping[str, int], max_positions: int, thetas: Mapping[str, float]
    ) -> tuple[RopeConfig, RopeConfig]:
        """Rotary settings of the full and of the sliding layers: a dictionary for each in ``rope_parameters``.

        Args:
          head_dims: channels of a head by layer type.
          max_positions: the context length.
          thetas: base by layer type, where the dictionary has none.
        """
        written: dict[str, Any] = self.get("rope_parameters", dict, None) or {}
        scaling = self.get("rope_scaling", dict, None) or {}  # never touches the sliding layers
        ropes = []
        for part in ("full_attention", "sliding_attention"):
            settings = written.get(part) or {}
            if not isinstance(settings, dict):
                self.problems.append(f"config.json: rope_parameters.{part} = {settings!r} should be a dictionary")
                settings = {}
            outside = scaling if part == "full_attention" else {}
            merged = {"rope_theta": thetas[part], **settings, **outside}
            ropes.append(self.rope_settings(merged, f"rope_parameters.{part}", head_dims[part], max_positions))
        if beside := {k: v for k, v in written.items() if k not in head_dims}:
            beside = {"rope_theta": thetas["full_attention"], **beside}
            flat = self.rope_settings(beside, "rope_parameters", head_dims["full_attention"], max_positions)
            if any(flat != rope for rope in ropes):
                self.problems.append(
                    f"config.json: 'rope_parameters' has {sorted(beside)} beside the settings of 'full_attention' and "
                    "'sliding_attention', and they say something else: read as those of both, the layers rotate by "
                    "them; transformers reads those of each type, or its defaults. Write the settings of each type"
                )
        return ropes[0], ropes[1]

    def rope_settings(
        self,
        written: Mapping[str, Any],
        name: str,
        head_dim: int,
        max_positions: int,
        rename: Mapping[str, str] = RETIRED_ROPE_NAMES,
    ) -> RopeConfig:
        """One dictionary of rotary settings (``rope_theta`` in it), resolved."""
        kind, settings = self._rope_kind(written, name, rename)
        share = min(settings.get("partial_rotary_factor", 1.0), 2.0)  # beyond 1 is refused; 1e308 heads are infinite
        rotary_dim = head_dim if kind == "proportional" else int(head_dim * share)
        self._check_rotary_dim(kind, rotary_dim, settings, name)
        original = int(settings.get("original_max_position_embeddings") or max_positions)
        factor = float(settings.get("factor") or max_positions / original)
        return RopeConfig(
            kind=kind,
            theta=float(settings["rope_theta"]),
            rotary_dim=rotary_dim,
            max_positions=max_positions,
            factor=factor if kind != "default" else 1.0,
            original_max_positions=original,
            rotating_pairs=int(share * head_dim // 2) if kind == "proportional" else 0,
            attention_factor=_attention_factor(kind, settings, factor, original),
            low_freq_factor=float(settings.get("low_freq_factor") or 1.0),
            high_freq_factor=float(settings.get("high_freq_factor") or 4.0),
            beta_fast=float(settings.get("beta_fast") or 32.0),
            beta_slow=float(settings.get("beta_slow") or 1.0),
            truncate=bool(settings.get("truncate", True)),
            short_factor=tuple(settings["short_factor"]) if kind == "longrope" else (),
            long_factor=tuple(settings["long_factor"]) if kind == "longrope" else (),
        )

    def _rope_kind(
        self, written: Mapping[str, Any], name: str, rename: Mapping[str, str]
    ) -> tuple[RopeKind, dict[str, Any]]:
        """The rope type and its settings; the default type for a dictionary with problems."""
        settings = {k: v for k, v in written.items() if v is not None and k not in ROPE_UNREAD}
        kind = settings.pop("rope_type", settings.pop("type", "default"))
        kind = rename.get(kind, kind) if isinstance(kind, str) else kind
        plain = {"rope_theta": _number_or(settings.get("rope_theta"), 10000.0)}
        if not isinstance(kind, str) or kind not in ROPE_KEYS:
            self.problems.append(f"config.json: {name} has unknown rope type {kind!r} (known: {', '.join(ROPE_KEYS)})")
            return "default", plain
        settings = {k: v for k, v in settings.items() if not _rope_off(k, v, ROPE_KEYS[kind])}
        # the context of pre-training is written beside kinds that do not read it
        known = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings", *ROPE_KEYS[kind]}
        faults = [
            *(f"has unknown key {k!r}" for k in sorted(settings.keys() - known)),
            *(f"lacks {k!r}" for k in ROPE_NEEDS.get(kind, ()) if k not in settings),
            *(f"has {k!r} = {v!r}, which is no {ROPE_VALUE}" for k, v in settings.items() if not _rope_value(k, v)),
            *_band_problems(kind, settings),
        ]
        self.problems += [f"config.json: {name} of type {kind!r} {f}" for f in faults]
        return ("default", plain) if faults else (kind, settings)

    def _check_rotary_dim(self, kind: str, rotary_dim: int, settings: Mapping[str, Any], name: str) -> None:
        """Pairs of channels rotate, and lists of factors have one number for each pair."""
        least = 4 if kind == "dynamic" else 2
        if rotary_dim % 2 or rotary_dim < least or settings.get("partial_rotary_factor", 1.0) > 1:
            self.problems.append(
                f"config.json: {rotary_dim} rotating channels of a head; expected an even number from {least} on, and "
                "not more than it has"
            )
        for key in ("short_factor", "long_factor"):
            if kind == "longrope" and len(settings[key]) != rotary_dim // 2:
                self.problems.append(
                    f"config.json: {name}.{key} has {len(settings[key])} numbers; expected {rotary_dim // 2}"
                )

    def flags(self, key: str, num_layers: int, default: Sequence[bool]) -> tuple[bool, ...]:
        """A list of 0 and 1 with one for each layer at least, or the default where there is none."""
        written = self.get(key, list, None)
        if not written:
            return tuple(default)
        if len(written) < num_layers or any(v not in (0, 1) for v in written):
            self.problems.append(f"config.json: {key!r} should list {num_layers} of 0, 1; found {_short(written)}")
            return tuple(default)
        return tuple(bool(v) for v in written[:num_layers])

    def every(self, key: str, default: int, num_layers: int) -> list[bool]:
        """Per layer whether it is one of those that come every ``key`` layers, the last of each group."""
        step = self.size(key, default)
        return [(i + 1) % step == 0 for i in range(num_layers)]

    def layer_numbers(self, key: str, num_layers: int) -> list[int] | None:
        """A list of numbers of layers; None where the key is absent or null."""
        written = self.get(key, list, None)
        if written is None or all(isinstance(n, int) and 0 <= n < num_layers for n in written):
            return written
        self.problems.append(
            f"config.json: {key!r} should list layers from 0 to {num_layers - 1}; found {_short(written)}"
        )
        return None

    def one_of(self, keys: Sequence[str], default: int) -> int:
        """A positive integer that may be written under any of several names, which must agree."""
        written = {key: self.size(key, None) for key in keys}
        values = {value for value in written.values() if value is not None}
        if len(values) > 1:
            self.problems.append(f"config.json: {written} are names of one number; expected one value")
        return next(iter(values), default)

    def layer_types(self, known: Iterable[str], num_layers: int, default: Sequence[str]) -> list[str]:
        """``layer_types`` where it is written, one of ``known`` for each layer, else ``default``."""
        types, known = self.get("layer_types", list, None), tuple(known)
        if types is not None and (len(types) != num_layers or not all(t in known for t in types)):
            self.problems.append(
                f"config.json: 'layer_types' should list {num_layers} of {', '.join(known)}; found {types!r}"
            )
            types = None
        return list(default if types is None else types)

    def windows(
        self, window: int | None, num_layers: int, default: Sequence[bool], local: str = "sliding_attention"
    ) -> tuple[int | None, ...]:
        """Per layer the window or None, from ``layer_types`` where written, else from ``default`` (True: sliding)."""
        types = self.layer_types(
            ("full_attention", local), num_layers, [local if s else "full_attention" for s in default]
        )
        sliding = [t == local for t in types]
        if any(sliding) and window is None:
            self.problems.append(f"config.json: {local} layers, but their window is null or switched off")
        return tuple(window if s else None for s in sliding)

    def finish(self) -> list[str]:
        """All problems, unknown keys included."""
        for key, allowed in OFF.items():
            if key not in self._seen:
                self.must_be(key, *allowed)
        if changing := [k for k in self._unknown() if self._matters(k)]:
            self.problems.append(
                f"config.json: not handled for this family: {self._shown(changing)}; remove a key only if it cannot "
                "change the numbers"
            )
        return self.problems

    def unread(self) -> str:
        """The keys that no code of the model reads, with their values; empty where there is none."""
        return self._shown([k for k in self._unknown() if not self._matters(k)])

    def _matters(self, key: str) -> bool:
        """Whether an unknown key may change numbers; the settings of a window that is switched off do not."""
        if key in ("sliding_window", "max_window_layers"):
            used = self.raw.get("use_sliding_window")
            if used is False or (used is None and self.raw.get("sliding_window") is None):
                return False
        return _changes_numbers(key, self.raw[key]) and not self._repeats(key)

    def _repeats(self, key: str) -> bool:
        """Whether a key has the value of one that was read and is another name of the same number."""
        others = {name for names in COPIES if key in names for name in names & self._seen - {key}}
        value = self.raw[key]
        return not isinstance(value, bool) and any(self.raw.get(name) == value for name in others)

    def _unknown(self) -> list[str]:
        return sorted(k for k, v in self.raw.items() if k not in self._seen and v is not None)

    def _shown(self, keys: Sequence[str]) -> str:
        return ", ".join(f"{k!r} = {self.raw[k]!r}"[:80] for k in keys)


def _changes_numbers(key: str, value: Any) -> bool:
    """Whether a key that nobody knows speaks of arithmetic, by the words of its name, and is not off.

    >>> [_changes_numbers(*kv) for kv in (("max_sequence_length", 2048), ("logit_scale", 0.5), ("logit_scale", 1))]
    [False, True, False]
    """
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    values = [NUMBER_WORDS[word] for word in words if word in NUMBER_WORDS]
    if not values or NO_NUMBER_WORDS & set(words):
        return False
    if value in ("", [], {}):
        return False
    if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
        return False  # all alike, as in a family that has one kind
    # a truth value is no number: True is not a scale of 1
    return not any(value == off and isinstance(value, bool) == isinstance(off, bool) for offs in values for off in offs)


def _placeholder(kind: Any) -> Any:
    """A valid value in place of a missing or wrong one, so that later problems are reported too."""
    kind = kind if isinstance(kind, type) else kind[0]
    return 1 if kind in (int, float) else kind()


def _short(value: Any) -> str:
    """A value for a message; a number of many digits loses its middle."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of over 40 digits"
    return text if len(text) <= 80 else f"{text[:60]} ..."


def _number_or(value: Any, default: float) -> float:
    return float(value) if _positive(value) else default


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _rope_value(key: str, value: Any) -> bool:
    """Whether a rotary setting has the type its key asks for."""
    if key == "truncate":
        return isinstance(value, bool)
    if key == "original_max_position_embeddings":
        return isinstance(value, int) and 1 < value <= LARGEST
    if key in {"short_factor", "long_factor"}:
        return isinstance(value, list) and all(_positive(v) for v in value)
    return _positive(value)


def _rope_off(key: str, value: Any, read: Collection[str]) -> bool:
    """Whether a rotary setting is at the value that means none: a factor of 1 that the kind does not read, no mscale.

    >>> [_rope_off(*kvr) for kvr in (("factor", 1.0, ()), ("factor", 1.0, ("factor",)), ("mscale_all_dim", 0.0, ()))]
    [True, False, True]
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (
        value == 0 if key in ("mscale", "mscale_all_dim") else key.endswith("factor") and key not in read and value == 1
    )


def _band_problems(kind: str, settings: Mapping[str, Any]) -> list[str]:
    """The Llama 3.1 rule blends between two bounds, which must be in order."""
    low, high = (_number_or(settings.get(k), 1.0) for k in ("low_freq_factor", "high_freq_factor"))
    if kind == "llama3" and high < low:
        return [f"has low_freq_factor {low!r}, which should not be above high_freq_factor {high!r}"]
    return []


def _attention_factor(kind: str, settings: dict[str, Any], factor: float, original: int) -> float:
    """What multiplies cos and sin: 1, YaRN's 0.1 ln(factor) + 1, or LongRoPE's sqrt(1 + ln factor / ln original)."""
    written = settings.get("attention_factor")
    if kind not in {"yarn", "longrope"}:
        return 1.0
    if written is not None:
        return float(written)
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    if mscale and all_dim:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1
