"""The architecture of a decoder as one frozen dataclass: one field per behaviour, every field read somewhere."""

from dataclasses import dataclass, replace
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: which frequencies, and how they are scaled for long contexts."""

    kind: RopeKind = "default"
    theta: float
    rotary_dim: int
    """How many of a head's channels rotate (the first ones)."""
    max_positions: int
    """``max_position_embeddings``: from where on ``dynamic`` scales."""
    factor: float = 1.0
    original_max_positions: int = 0
    """Context of pre-training: ``yarn``, ``llama3`` and ``longrope``."""
    attention_factor: float = 1.0
    """Multiplies cos and sin (``yarn``, ``longrope``)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def length_threshold(self) -> int | None:
        """Sequences longer than this rotate differently; None where the length never matters."""
        if self.kind == "dynamic":
            return self.max_positions
        return self.original_max_positions if self.kind == "longrope" else None


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What the parameters of a layer are: layers of one kind have the same ones, and one compiled program."""

    mixer: str = "attention"
    """How tokens see each other, a key of ``kinds.MIXERS``."""
    mlp: str = "dense"
    """What is applied to each token, a key of ``kinds.MLPS``."""
    head_dim: int | None = None
    """Sizes where they are not the model's (here and below)."""
    num_kv_heads: int | None = None
    mlp_width: int | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model."""

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float
    norm_weight: bool = True
    norm_bias: bool = False
    norm_plus_one: bool = False
    """RMSNorm multiplies by 1 + weight (Gemma)."""
    norm_rounds_last: bool = False
    """RMSNorm multiplies by its weight before it rounds to the model's dtype (Gemma, OLMo 2), not after."""
    norm_before: bool = True
    """A norm before attention and before the MLP."""
    norm_after: bool = False
    """A norm after attention and after the MLP, before the residual sum."""
    parallel_residual: bool = False
    """x + attention(norm x) + mlp(norm' x) instead of one after the other."""

    rope: RopeConfig | None
    """None: learned absolute positions."""
    local_rope: RopeConfig | None = None
    """Rotary positions of the sliding-window layers where they differ."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: over each head, or over all heads together."""
    qkv_clip: float | None = None
    attention_scale: float
    attention_softcap: float | None = None
    windows: tuple[int | None, ...]
    """Per layer: a position sees at most this many positions, itself included; None sees all."""

    layer_kinds: tuple[LayerKind, ...] = ()
    """The kind of each layer; none: all are of the default kind."""

    gated_mlp: bool = True
    activation: Activation = "silu"
    mlp_bias: bool = False

    embedding_scale: float | None = None
    tie_embeddings: bool = False
    logit_scale: float | None = None
    logit_softcap: float | None = None

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return self.layer_kinds or (LayerKind(),) * self.num_layers

    def of_kind(self, kind: LayerKind) -> "DecoderConfig":
        """The config with the sizes that layers of ``kind`` have."""
        sizes = {name: getattr(kind, name) for name in ("head_dim", "num_kv_heads", "mlp_width")}
        return replace(self, **{name: size for name, size in sizes.items() if size is not None})
