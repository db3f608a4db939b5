"""How the layers of a decoder are stacked: equal kinds together, one scan for each group of layers that repeats.

The kinds of the layers, say ``d d d r r r`` (dense, routed) or ``s s f s s f`` (sliding, full), are cut into
*groups* that repeat a *period*: ``d`` three times and ``r`` three times, or ``s s f`` twice. The layers at one place
of a period have their parameters stacked on a leading axis, and a group is one ``lax.scan`` whose step is its period.
The cut is the one with the fewest layers to compile.

A stack is named after its first layer, ``layers.3``; where all layers are of one kind there is one stack, ``layers``.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ches_jax.models.config import DecoderConfig, LayerKind

ROOT = "layers"
LONGEST_PERIOD = 32


class Stack(NamedTuple):
    """Layers of one kind whose parameters are stacked."""

    name: str
    """``layers``, or ``layers.3``."""
    kind: LayerKind
    layers: tuple[int, ...]


class LayerGroup(NamedTuple):
    """Layers that follow each other: layer i of the first stack, of the second, ..., then layer i + 1 of each."""

    stacks: tuple[Stack, ...]

    @property
    def repeats(self) -> int:
        """How often the period comes."""
        return len(self.stacks[0].layers)


@lru_cache(maxsize=64)
def layer_groups(config: DecoderConfig) -> tuple[LayerGroup, ...]:
    """The layers in order."""
    cuts = _cuts(config.kinds)
    alone = sum(period for _, period, _ in cuts) == 1

    def stack(first: int, period: int, repeats: int) -> Stack:
        layers = tuple(range(first, first + period * repeats, period))
        return Stack(ROOT if alone else f"{ROOT}.{first}", config.kinds[first], layers)

    return tuple(
        LayerGroup(tuple(stack(start + place, period, repeats) for place in range(period)))
        for start, period, repeats in cuts
    )


def stacks(config: DecoderConfig) -> tuple[Stack, ...]:
    """All stacks, by their first layer."""
    return tuple(stack for group in layer_groups(config) for stack in group.stacks)


def layers_of(config: DecoderConfig, param: str) -> tuple[int, ...]:
    """The layers along the leading axis of ``param``, in order; none outside the layers."""
    return next((s.layers for s in stacks(config) if param.startswith(f"{s.name}.")), ())


def below_stack(param: str) -> str | None:
    """The name of a layer's parameter (or module) within the layer; None for others.

    >>> below_stack("layers.3.self_attn.q_proj.weight"), below_stack("layers.mlp.up_proj.weight"), below_stack("norm")
    ('self_attn.q_proj.weight', 'mlp.up_proj.weight', None)
    """
    root, _, rest = param.partition(".")
    if root != ROOT:
        return None
    first, _, inner = rest.partition(".")
    return inner if first.isdigit() else rest


def _cuts(kinds: Sequence[LayerKind]) -> list[tuple[int, int, int]]:
    """(start, period, repeats) of each group, with the least sum of periods.

    >>> a, b = LayerKind(), LayerKind(mlp="routed")
    >>> _cuts([a, a, a, b, b]), _cuts([a, b] * 3), _cuts([a, a, b] * 2 + [a])
    ([(0, 1, 3), (3, 1, 2)], [(0, 2, 3)], [(0, 3, 2), (6, 1, 1)])
    """
    count = len(kinds)
    best: list[tuple[int, list[tuple[int, int, int]]]] = [(0, [])] * (count + 1)
    for start in range(count - 1, -1, -1):
        options = []
        for period in range(1, min(LONGEST_PERIOD, count - start) + 1):
            repeats = _repeats(kinds, start, period)
            cost, rest = best[start + period * repeats]
            options.append((period + cost, [(start, period, repeats), *rest]))
        best[start] = min(options, key=lambda option: option[0])
    return best[0][1]


def _repeats(kinds: Sequence[LayerKind], start: int, period: int) -> int:
    """How often the ``period`` kinds from ``start`` on come one after the other."""
    at = start + period
    while at < len(kinds) and kinds[at] == kinds[at - period]:
        at += 1
    return (at - start) // period
