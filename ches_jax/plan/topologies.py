"""Devices by name, without having them: what they hold, how fast they are, and their mesh.

Rates are the makers' peak numbers: TPU v5e, v5p and v6e from Google's pages of the chips, H100 and A100 (SXM) from
NVIDIA's data sheets. The bandwidth between chips is that of all links of one chip together.
"""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from ches_jax.errors import ChesError


@dataclass(frozen=True)
class Chip:
    """One device."""

    platform: str
    memory: float
    """Bytes."""
    flops: float
    """bfloat16, a second."""
    bandwidth: float
    """Bytes a second from its memory."""
    links: float
    """Bytes a second to other chips of its slice."""
    dimensions: int
    """Of the grid of a slice."""
    host: tuple[int, ...]
    """The grid of a host's devices."""


GB = 1e9
CHIPS = {
    "v5e": Chip("tpu", 16 * 2**30, 197e12, 819 * GB, 200 * GB, 2, (2, 2)),
    "v5p": Chip("tpu", 95 * 2**30, 459e12, 2765 * GB, 600 * GB, 3, (2, 2, 1)),
    "v6e": Chip("tpu", 32 * 2**30, 918e12, 1640 * GB, 448 * GB, 2, (2, 2)),
    "h100": Chip("gpu", 80 * GB, 989e12, 3350 * GB, 450 * GB, 1, (8,)),
    "a100": Chip("gpu", 80 * GB, 312e12, 2039 * GB, 300 * GB, 1, (8,)),
}
BETWEEN_SLICES = 25 * GB / 8
"""Bytes a second and chip over the network of a data centre: 200 Gbit/s a host of eight chips."""


@dataclass(frozen=True)
class Topology:
    """Slices of a number of chips of one kind."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def size(self) -> int:
        """Chips in all."""
        return math.prod(self.shape) * self.slices

    @property
    def hosts(self) -> int:
        """Processes of a run: one a host.

        >>> parse_topology("v5e:4x4").hosts, parse_topology("h100:8").hosts
        (4, 1)
        """
        return max(1, self.size // math.prod(self.chip.host))

    def of_host(self) -> "Topology":
        """The devices of one host, which compiles as a slice of its own: part of a slice is none.

        >>> parse_topology("v5p:4x4x4").of_host().name
        'v5p:2x2x1'
        """
        if self.hosts == 1:
            return self
        kind = self.name.partition(":")[0]
        return Topology(f"{kind}:{'x'.join(map(str, self.chip.host))}", self.chip, self.chip.host, 1)


def parse_topology(text: str, slices: int = 1) -> Topology:
    """The devices that a name stands for.

    >>> parse_topology("v6e:16x16", 2).size
    512

    Raises:
      ChesError: not a name of known chips.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text.strip().lower())
    chip = CHIPS.get(match[1]) if match else None
    if match is None or chip is None:
        raise ChesError(f"--topology {text!r}: expected a chip ({', '.join(CHIPS)}) and its grid, such as v5e:4x4")
    shape = tuple(int(n) for n in match[2].split("x"))
    if len(shape) != chip.dimensions or 0 in shape:
        raise ChesError(
            f"--topology {text!r}: a slice of {match[1]} has {chip.dimensions} dimensions"
            f"{', such as ' + match[1] + ':2x2x4' if chip.dimensions == 3 else ''}"
        )
    if slices < 1:
        raise ChesError(f"--slices {slices}: expected 1 or more")
    return Topology(match[0], chip, shape, slices)


def devices_of(topology: Topology) -> list[Any]:
    """The devices as the compiler knows them.

    Raises:
      ChesError: the TPU compiler is not installed, or knows no such slice.
    """
    from importlib.util import find_spec

    if find_spec("libtpu") is None:
        raise ChesError(
            f"--topology {topology.name}: compiling for a TPU needs its compiler (and no TPU): pip install "
            "'ches-jax[tpu]'; --arithmetic counts without it"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the compiler takes no device: others may run beside it
    from jax.experimental import topologies

    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)
    except Exception as error:  # whatever the compiler raises
        reason = str(error).partition("\n")[0][:200]
        raise ChesError(f"--topology {topology.name}: the TPU compiler knows no such slice ({reason})") from None
