"""What can be counted without compiling: bytes of weights and optimiser by the partition table, FLOPs, activations."""

import math
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh

from ches_jax.distributed.mesh import AXES, LogicalMesh
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import abstract_parameters
from ches_jax.models.sharding import partition_spec
from ches_jax.plan.config import PlanConfig

OPTIMISER = {"adamw": 2, "rmsprop": 1, "sgd": 0, "adafactor": 0}
"""float32 numbers that an optimiser keeps beside each trained one (adafactor: rows and columns, next to none)."""
FILLED = 0.9
"""Share of the positions of packed rows that hold tokens, as measured for pairs of usual lengths."""


class Bytes(NamedTuple):
    """Of one device."""

    weights: int
    optimiser: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def logical_mesh(sizes: dict[str, int]) -> LogicalMesh:
    """A mesh of these sizes without devices."""
    mesh = AbstractMesh(tuple(sizes.get(a, 1) for a in AXES), AXES)
    return LogicalMesh(mesh, tuple((a, (a,)) for a in AXES))  # type: ignore[arg-type]


def bytes_of(decoder: DecoderConfig, config: PlanConfig, sizes: dict[str, int]) -> Bytes:
    """Bytes a device; weights and optimiser exactly, activations roughly."""
    mesh, width = logical_mesh(sizes), np.dtype("float16").itemsize if config.dtype != "float32" else 4
    full = config.what in ("train", "forecast") and config.lora_rank is None
    held = 0
    for name, leaf in abstract_parameters(decoder).items():
        spec = partition_spec(name, leaf.shape, mesh)
        used = [a for entry in spec if entry for a in ((entry,) if isinstance(entry, str) else entry)]
        held += math.prod(leaf.shape) // math.prod(sizes.get(a, 1) for a in used)
    weights = held * (4 if full else width)
    optimiser = held * 4 * OPTIMISER.get(config.optimizer, 2) if full and config.what == "train" else 0
    if config.what == "forecast":
        optimiser = held * 4  # the direction
    return Bytes(weights, optimiser, _activations(decoder, config, sizes, width, full))


def _activations(decoder: DecoderConfig, config: PlanConfig, sizes: dict[str, int], width: int, full: bool) -> int:
    tokens = config.rows * (config.prompt_tokens if config.what == "generate" else config.row_tokens)
    tensor = sizes["tensor"]
    layer = (
        tokens * width * (6 * decoder.width + 3 * (decoder.mlp_width + decoder.num_heads * decoder.head_dim) // tensor)
    )
    if config.what == "generate":
        slots = config.prompt_tokens + config.new_tokens
        heads = decoder.num_kv_heads // math.gcd(decoder.num_kv_heads, tensor)
        return layer + 2 * decoder.num_layers * config.rows * slots * heads * decoder.head_dim * width
    if config.what == "score":
        return layer
    kept = tokens * decoder.width * width * (1 if config.remat else 12) * decoder.num_layers
    gradients = bytes_of_gradient(decoder, sizes) if full else 0
    return kept + 3 * layer + gradients


def bytes_of_gradient(decoder: DecoderConfig, sizes: dict[str, int]) -> int:
    """A float32 number for each weight that a device holds."""
    count = sum(math.prod(leaf.shape) for leaf in abstract_parameters(decoder).values())
    return 4 * count // (sizes["fsdp"] * sizes["tensor"])


def flops_of_token(decoder: DecoderConfig, tokens: int, *, logits: bool) -> float:
    r"""Of one forward pass, for a token of a sequence of ``tokens``.

    .. math:: 2 P + 2 H d_h (T + 1) L

    with the P weights of matrices (of routed experts the share that a token goes through; the unembedding only where
    logits are computed) and causal attention over T tokens, a query at T / 2 keys on average, two products of
    2 d_h each.
    """
    matrices = 0.0
    for name, leaf in abstract_parameters(decoder).items():
        table = name.split(".")[0] in ("embed_tokens", "embed_positions", "lm_head")
        routed = decoder.experts is not None and ".experts." in name
        vector = len(leaf.shape) < 2 + name.startswith("layers.") + routed
        share = decoder.experts.per_token / decoder.experts.count if routed and decoder.experts else 1.0
        matrices += 0 if table or vector else share * math.prod(leaf.shape)
    matrices += decoder.vocab_size * decoder.width if logits else 0
    attention = 2 * decoder.num_heads * decoder.head_dim * (tokens + 1) * decoder.num_layers
    return 2.0 * matrices + attention


def flops_of_pair(decoder: DecoderConfig, config: PlanConfig) -> float:
    """Of one pair (of one text for ``generate``): what the arithmetic asks for, without computing again.

    A gradient costs two forward passes; of adapters one, since the frozen matrices get none.
    """
    if config.what == "generate":
        length = config.prompt_tokens + config.new_tokens
        return length * flops_of_token(decoder, length, logits=False) + (
            config.new_tokens * 2.0 * decoder.vocab_size * decoder.width
        )
    logits = config.what != "score" or config.logps
    forward = config.pair_tokens * flops_of_token(decoder, config.pair_tokens, logits=logits)
    passes = {"score": 1, "train": (3 if config.lora_rank is None else 2) * config.epochs, "forecast": 8}
    return forward * passes[config.what]


def meshes(decoder: DecoderConfig, config: PlanConfig, size: int, slices: int) -> list[dict[str, int]]:
    """Every mesh of ``size`` devices that divides the model, the one that moves least first.

    Rows on as few axes as the memory allows: weights whole where they fit, then sharded within a slice, then heads too.
    """
    inside = size // slices
    heads = math.gcd(decoder.num_kv_heads, decoder.num_heads)
    found = [
        {"data": size // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
        for tensor in (n for n in range(1, inside + 1) if inside % n == 0 and heads % n == 0 and n <= 8)
        for fsdp in (n for n in range(1, inside // tensor + 1) if (inside // tensor) % n == 0)
    ]
    divides = [s for s in found if s["fsdp"] == 1 or decoder.width % s["fsdp"] == 0]
    return sorted(divides, key=lambda s: (s["tensor"], s["fsdp"]))
