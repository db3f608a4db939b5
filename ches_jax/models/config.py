"""The architecture of a decoder as one frozen dataclass: one field per behaviour, every field read somewhere."""

from dataclasses import dataclass, fields, replace
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: which frequencies, and how they are scaled for long contexts."""

    kind: RopeKind = "default"
    theta: float
    rotary_dim: int
    """How many of a head's channels rotate (the first ones)."""
    neighbours: bool = False
    """Each channel rotates with its neighbour, not with the one half of the rotating channels away."""
    max_positions: int
    """``max_position_embeddings``: from where on ``dynamic`` scales."""
    factor: float = 1.0
    original_max_positions: int = 0
    """Context of pre-training: ``yarn``, ``llama3`` and ``longrope``."""
    attention_factor: float = 1.0
    """Multiplies cos and sin (``yarn``, ``longrope``)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    rotating_pairs: int = 0
    """``proportional``: the pairs of channels that rotate; the others are paired too, and stand still."""
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
class QueryGrowth:
    """Queries grow with their position p, by the factor ``1 + strength * ln(1 + floor((p + shift) / every))``."""

    strength: float
    every: int
    shift: int = 0
    unrotated_only: bool = False
    """Only in layers that do not rotate."""
    single: bool = False
    """The factor is computed in float32 whatever the model's dtype, as the family's own code does."""


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Latent attention: queries, and keys with values, pass through a vector of low rank; part of a head rotates."""

    query_rank: int | None
    """None: queries are a plain projection."""
    kv_rank: int
    rotary_dim: int
    """Channels of a head that rotate; their keys are the same for all heads."""
    plain_dim: int
    """Channels of a head that do not."""
    value_dim: int
    norm_eps: float
    """Of the norms of the two vectors of low rank."""


@dataclass(frozen=True, kw_only=True)
class ClampedGate:
    """``(u + 1) g sigmoid(alpha g)`` of a gate g of at most ``limit`` and a u within plus and minus ``limit``."""

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Routed experts: each token goes through the few that its router chooses."""

    count: int
    per_token: int
    width: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    """From the router's logits to the weights of the experts."""
    renormalise: bool = False
    """The weights of a token's experts are divided by their sum."""
    scale: float = 1.0
    """Multiplies the weights."""
    weighs_inputs: bool = False
    """The weight multiplies what an expert is given, not what it gives."""
    correction: bool = False
    """A stored number for each expert is added to its score where experts are chosen, and only there."""
    groups: int = 1
    groups_kept: int = 1
    """Experts are chosen from so many groups: those whose two best scores have the largest sums."""
    router_bias: bool = False
    bias: bool = False
    """Biases of the experts' matrices."""
    shared_width: int | None = None
    """Width of an expert that every token goes through; None: there is none."""
    shared_gate: bool = False
    """What it gives is multiplied by the sigmoid of a projection of the token to one number."""
    scaled_router: bool = False
    """The router takes x before the norm, normalised without weights and multiplied by stored numbers; the weight of an
    expert is multiplied by a stored number of its own."""


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig:
    """A gated convolution over the last ``kernel`` tokens."""

    kernel: int
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class DeltaRuleConfig:
    """The gated delta rule: each value head has a matrix of memory, [key_dim, value_dim]."""

    key_heads: int
    value_heads: int
    """A multiple of the key heads, which they share."""
    key_dim: int
    value_dim: int
    kernel: int
    """Tokens that the convolution before it reaches over."""

    @property
    def channels(self) -> int:
        """Of queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


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
    """Of a dense MLP."""
    local: bool | None = None
    """Whether it has a window, where that decides its sizes."""
    kv: Literal["own", "lent", "borrowed"] | None = None
    """Keys and values are a layer's own; own and lent to later layers; those of an earlier layer."""
    values_are_keys: bool | None = None
    """Values are the keys before their norm and rotation."""


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
    shared_norm: bool = False
    """With a parallel residual: attention and MLP take the same normalised x."""
    residual_scale: float | None = None
    """Multiplies what attention and MLP add."""

    rope: RopeConfig | None
    """None: learned absolute positions."""
    local_rope: RopeConfig | None = None
    """Rotary positions of the sliding-window layers where they differ."""
    rotated: tuple[bool, ...] = ()
    """Per layer whether it rotates; none: all do."""
    query_growth: QueryGrowth | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full", "rotated"] = "none"
    """RMSNorm of queries and keys: over each head, over all heads together, or (without weights, after the rotation)
    over each head of the layers that rotate."""
    qkv_clip: float | None = None
    sinks: bool = False
    """A learned number for each head joins the total of the softmax, and nothing else."""
    latent: LatentConfig | None = None
    """Of layers whose mixer is ``latent``."""
    output_gate: bool = False
    """What attention gives is multiplied by the sigmoid of another projection of the token."""
    short_conv: ShortConvConfig | None = None
    """Of layers whose mixer is ``short_conv``."""
    delta_rule: DeltaRuleConfig | None = None
    """Of layers whose mixer is ``delta_rule``."""
    attention_scale: float
    attention_softcap: float | None = None
    windows: tuple[int | None, ...]
    """Per layer: a position sees at most this many positions, itself included; None sees all."""
    value_norm: bool = False
    """RMSNorm without weights of the values of each head."""
    local: bool | None = None
    """Of one kind of layer, as the next two: see ``LayerKind``, and ``of_kind``, which fills them in."""
    kv: Literal["own", "lent", "borrowed"] = "own"
    values_are_keys: bool = False
    chunked: bool = False
    """Windows stand still: a position sees those of its own chunk of so many positions, up to itself."""

    layer_kinds: tuple[LayerKind, ...] = ()
    """The kind of each layer; none: all are of the default kind."""

    gated_mlp: bool = True
    activation: Activation = "silu"
    mlp_bias: bool = False
    clamped_gate: ClampedGate | None = None
    """Of experts, in place of the activation."""
    experts: ExpertsConfig | None = None
    """Of layers whose MLP is ``routed``."""

    per_layer_width: int | None = None
    """Each layer is given a vector of this width for each token, from an embedding of its own; None: there is none."""
    per_layer_vocab: int = 0
    """Rows of that embedding."""
    layer_scalar: bool = False
    """What a layer gives is multiplied by a stored number."""

    prediction_layers: int = 0
    """Layers that checkpoints may hold beyond these, for predicting several tokens at once; they are not read."""

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
        own = {f.name: getattr(kind, f.name) for f in fields(kind) if f.name not in ("mixer", "mlp")}
        return replace(self, **{name: value for name, value in own.items() if value is not None})
