"""What can be counted without compiling: bytes of weights and optimiser by the partition table, FLOPs, activations."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh

from ches_jax.distributed.mesh import AXES, LogicalMesh
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import abstract_parameters
from ches_jax.models.sharding import partition_spec
from ches_jax.plan.config import PlanConfig
from ches_jax.plan.topologies import Topology

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


class Layout(NamedTuple):
    """A mesh of every device, or one a host, each with a process that shares no batch with others."""

    sizes: dict[str, int]
    """Of the axes of a mesh."""
    meshes: int = 1
    """How many such meshes are side by side."""


def layout(config: PlanConfig, sizes: dict[str, int], topology: Topology) -> Layout | None:
    """How a verb computes on a mesh of these sizes (``distributed.mesh_of_run``); None: not on these devices.

    >>> from ches_jax.plan.topologies import parse_topology
    >>> layout(PlanConfig(what="score", topology="v5e:4x4"), {"data": 4}, parse_topology("v5e:4x4")).meshes
    4
    """
    count = math.prod(sizes.values())
    if count == topology.size:
        return Layout(sizes)
    alone = config.what in ("score", "generate") and count * topology.hosts == topology.size
    return Layout(sizes, topology.hosts) if alone else None


def logical_mesh(sizes: dict[str, int]) -> LogicalMesh:
    """A mesh of these sizes without devices."""
    mesh = AbstractMesh(tuple(sizes.get(a, 1) for a in AXES), AXES)
    return LogicalMesh(mesh, tuple((a, (a,)) for a in AXES))  # type: ignore[arg-type]


@lru_cache(maxsize=4)
def _shapes(decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in abstract_parameters(decoder).items()}


def held(decoder: DecoderConfig, sizes: dict[str, int]) -> int:
    """Parameters that one device holds."""
    mesh, count = logical_mesh(sizes), 0
    for name, shape in _shapes(decoder).items():
        spec = partition_spec(name, shape, mesh)
        used = [a for entry in spec if entry for a in ((entry,) if isinstance(entry, str) else entry)]
        count += math.prod(shape) // math.prod(sizes.get(a, 1) for a in used)
    return count


def bytes_of(decoder: DecoderConfig, config: PlanConfig, sizes: dict[str, int]) -> Bytes:
    """Bytes a device; weights and optimiser exactly, activations roughly."""
    width, count = _width(config), held(decoder, sizes)
    full = config.what in ("train", "forecast") and config.lora_rank is None
    weights = count * (4 if full else width)
    optimiser = count * 4 * OPTIMISER[config.optimizer] if full and config.what == "train" else 0
    if config.what == "forecast":
        optimiser = count * 4  # the direction
    return Bytes(weights, optimiser, _activations(decoder, config, sizes, width, 4 * count if full else 0))


def _width(config: PlanConfig) -> int:
    """Bytes of a number of the computation."""
    return np.dtype("float16").itemsize if config.dtype != "float32" else 4


def _activations(decoder: DecoderConfig, config: PlanConfig, sizes: dict[str, int], width: int, gradients: int) -> int:
    tokens = config.rows * (config.prompt_tokens if config.what == "generate" else config.row_tokens)
    tensor = sizes["tensor"]
    layer = (
        tokens * width * (6 * decoder.width + 3 * (decoder.mlp_width + decoder.num_heads * decoder.head_dim) // tensor)
    )
    if decoder.experts is not None:
        # the tokens of all devices of the axis, once for each of their experts
        e = decoder.experts
        layer += tokens * sizes["expert"] * e.per_token * width * (2 * decoder.width + 3 * e.width)
    if config.what == "generate":
        slots = config.prompt_tokens + config.new_tokens
        heads = decoder.num_kv_heads // math.gcd(decoder.num_kv_heads, tensor)
        return layer + 2 * decoder.num_layers * config.rows * slots * heads * decoder.head_dim * width
    if config.what == "score":
        return layer
    kept = tokens * decoder.width * width * (1 if config.remat else 12) * decoder.num_layers
    return kept + 3 * layer + gradients


def flops_of_token(decoder: DecoderConfig, tokens: int, *, logits: bool) -> float:
    r"""Of one forward pass, for a token of a sequence of ``tokens``.

    .. math:: 2 P + 2 H d_h (T + 1) L

    with the P weights of matrices (of routed experts the share that a token goes through; the unembedding only where
    logits are computed) and causal attention over T tokens, a query at T / 2 keys on average, two products of
    2 d_h each.
    """
    matrices = 0.0
    for name, shape in _shapes(decoder).items():
        table = name.split(".")[0] in ("embed_tokens", "embed_positions", "lm_head")
        routed = decoder.experts is not None and ".experts." in name
        vector = len(shape) < 2 + name.startswith("layers.") + routed
        share = decoder.experts.per_token / decoder.experts.count if routed and decoder.experts else 1.0
        matrices += 0 if table or vector else share * math.prod(shape)
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


def moved(decoder: DecoderConfig, config: PlanConfig, sizes: dict[str, int]) -> float:
    """Bytes that reach a device in a forward pass, for as many rows as one device has alone.

    ``auto`` orders meshes by it, and asks the compiler about the first ones.

    Weights that lie over ``fsdp`` are gathered; over ``tensor`` two sums of activations a layer; over ``expert`` the
    tokens of all its devices, and what their experts give; over ``data`` the gradients of what is trained.
    """
    tokens, passes = config.rows * config.row_tokens, 1
    if config.what == "generate":
        tokens, passes = config.rows, config.new_tokens
    states = tokens * decoder.width * _width(config)
    whole = held(decoder, {**sizes, "fsdp": 1}) - held(decoder, sizes)
    routed = sum(kind.mlp != "dense" for kind in decoder.kinds) if decoder.experts is not None else 0
    travels = whole * _width(config) + states * (
        4 * decoder.num_layers * (1 - 1 / sizes["tensor"]) + 2 * routed * (sizes["expert"] - 1)
    )
    if config.what in ("train", "forecast") and config.lora_rank is None and sizes["data"] * sizes["expert"] > 1:
        travels += 8 * held(decoder, sizes)
    return passes * travels * sizes["tensor"]


def layouts(decoder: DecoderConfig, config: PlanConfig, topology: Topology) -> list[Layout]:
    """Every mesh that divides the model, the one that moves least first (``moved``).

    Of a verb whose processes can work each for itself those within a host are meshes of one host.
    """
    size, inside = topology.size, topology.size // topology.slices
    heads = math.gcd(decoder.num_kv_heads, decoder.num_heads)
    experts = 1 if decoder.experts is None else decoder.experts.count
    axes = [
        {"fsdp": fsdp, "tensor": tensor, "expert": expert}
        for tensor in _divisors(inside)
        if heads % tensor == 0 and tensor <= 8
        for expert in _divisors(inside // tensor)
        if experts % expert == 0
        for fsdp in _divisors(inside // tensor // expert)
        if decoder.width % fsdp == 0
    ]
    host, found = size // topology.hosts, []
    for one in axes:
        model = math.prod(one.values())
        alone = layout(config, {"data": host // model, **one}, topology) if host % model == 0 else None
        found.append(alone or Layout({"data": size // model, **one}))
    return sorted(
        found, key=lambda f: (moved(decoder, config, f.sizes), *(f.sizes[a] for a in ("tensor", "expert", "fsdp")))
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
