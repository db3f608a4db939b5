"""The way attention is computed: the best the device has, or the one asked for.

dense       jax.numpy, the whole mask: anywhere
blocks      jax.numpy, skips blocks with nothing to see: anywhere
pallas-tpu  ``pallas_tpu``
pallas-gpu  ``pallas_gpu``

``NAME:interpret`` runs a kernel of another device in emulation, which is slow: to look into it, and to test it. Before
a kernel is trusted it is compared with ``dense`` on the device. Gradients take ``with_gradient``.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ches_jax.errors import ChesError
from ches_jax.models.attention import dense
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import Attend
from ches_jax.models.attention.mask import KeyRanges, Visibility, key_ranges, within
from ches_jax.models.config import DecoderConfig

AUTO, INTERPRET = "auto", ":interpret"
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Largest difference from ``dense`` in float32 (or better), over the largest output, that is rounding: about four times
what 16-bit outputs and softmax weights lose, and twenty times in the other dtypes."""


class Setting(NamedTuple):
    """What decides whether a kernel can run."""

    platform: str
    device: str
    """In words."""
    capability: float
    """Compute capability of an NVIDIA GPU; 0 for others."""
    dtype: str
    head_dim: int
    group: int
    """Query heads of a key/value head."""


class Choice(NamedTuple):
    """The way that was chosen, and what was wrong with better ones."""

    name: str
    attend: Attend
    refused: tuple[str, ...] = ()


def _tpu(interpret: bool) -> Attend:
    from ches_jax.models.attention import pallas_tpu

    return partial(pallas_tpu.attend, interpret=interpret)


def _gpu(interpret: bool) -> Attend:
    from ches_jax.models.attention import pallas_gpu

    return partial(pallas_gpu.attend, interpret=interpret)


def _why_not_tpu(s: Setting) -> str | None:
    if s.platform != "tpu":
        return "it needs a TPU"
    if s.dtype not in ("float32", "bfloat16"):
        return f"it computes in float32 or bfloat16, not {s.dtype}"
    if s.group > 32:
        return f"it holds up to 32 query heads of a key/value head, this model has {s.group}"
    return None


def _why_not_gpu(s: Setting) -> str | None:
    if s.capability < 8:
        return "it needs an NVIDIA GPU of compute capability 8.0 or more"
    if s.dtype == "float64":
        return "it computes in float32, bfloat16 or float16, not float64"
    if s.head_dim > 256:
        return f"it takes heads of up to 256 channels, this model's have {s.head_dim}"
    return None


class Kernel(NamedTuple):
    """How to make it (interpreted or not), and why it cannot run in a setting."""

    make: Callable[[bool], Attend]
    why_not: Callable[[Setting], str | None]


KERNELS = {"pallas-tpu": Kernel(_tpu, _why_not_tpu), "pallas-gpu": Kernel(_gpu, _why_not_gpu)}
PLAIN: dict[str, Attend] = {"blocks": blocks, "dense": dense.dense}


def setting_of(config: DecoderConfig, dtype: DTypeLike) -> Setting:
    """A model on this process's devices."""
    device = jax.local_devices()[0]
    try:
        capability = float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD's are names
        capability = 0.0
    group = config.num_heads // config.num_kv_heads
    return Setting(device.platform, device.device_kind, capability, jnp.dtype(dtype).name, config.head_dim, group)


def choose_attention(asked: str, config: DecoderConfig, dtype: DTypeLike) -> Choice:
    """The way ``asked`` for; ``auto``: the first kernel that can run here and agrees with ``dense``, else ``blocks``.

    Raises:
      ChesError: an unknown name, a kernel that cannot run here or computes something else (with what can).
    """
    setting = setting_of(config, dtype)
    able = [n for n, kernel in KERNELS.items() if kernel.why_not(setting) is None]
    if asked == AUTO:
        faults = []
        for name in able:
            attend = KERNELS[name].make(False)
            fault = check(attend, config, setting.dtype)
            if fault is None:
                return Choice(name, attend, tuple(faults))
            faults.append(f"{name}: {fault}")
        return Choice("blocks", blocks, tuple(faults))
    if asked in PLAIN:
        return Choice(asked, PLAIN[asked])
    name = asked.removesuffix(INTERPRET)
    here = ", ".join([*able, *PLAIN])
    if name not in KERNELS:
        raise ChesError(f"--attention {asked!r}: expected {AUTO}, {', '.join([*KERNELS, *PLAIN])}")
    interpret = asked != name
    why = None if interpret else KERNELS[name].why_not(setting)
    if why is not None:
        raise ChesError(
            f"--attention {asked}: cannot run on this {setting.device}: {why}. Here can: {here} "
            f"(and {name}{INTERPRET}, emulated and slow)"
        )
    attend = KERNELS[name].make(interpret)
    fault = check(attend, config, setting.dtype)
    if fault is not None:
        raise ChesError(f"--attention {asked}: {fault}. Here can: {here}")
    return Choice(asked, attend)


def with_gradient() -> Attend:
    """The way training takes: ``blocks`` on a CPU; elsewhere ``slices``, which run without waiting for the data."""
    return blocks if jax.default_backend() == "cpu" else dense.slices


def check(attend: Attend, config: DecoderConfig, dtype: str) -> str | None:
    """What is wrong with ``attend`` on a small packed batch with the model's heads; None where it equals ``dense``."""
    seen = _packed_rows()
    rows, length = seen.own_start.shape
    heads = (config.num_heads // config.num_kv_heads, config.head_dim)
    shapes = ((rows, length, 1, *heads), (rows, length, 1, heads[1]), (rows, length, 1, heads[1]))
    q, k, v = (
        jax.random.normal(key, shape, jnp.dtype(dtype))
        for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    )
    options = {"scale": config.attention_scale, "softcap": config.attention_softcap}
    exact = jnp.float64 if dtype == "float64" else jnp.float32
    expected = jax.jit(partial(dense.dense, **options))(*(a.astype(exact) for a in (q, k, v)), seen)
    try:
        found = jax.jit(partial(attend, **options))(q, k, v, seen).astype(exact)
        error = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
    except Exception as e:  # whatever the compiler of a kernel raises
        return f"does not run: {type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"
    limit = TOLERANCE[dtype]
    if error <= limit:
        return None
    return (
        f"differs from the plain computation by {error:.1e} of the largest output, where rounding is below {limit:.0e}"
    )


def _packed_rows() -> KeyRanges:
    """Two rows of three pairs, of lengths that divide nothing; the second has a sliding window."""
    lengths = ((70, 41, 130), (5, 1, 3), (181, 67, 90))  # prompt, chosen, rejected
    stretches, at = [], 0
    for prompt, chosen, rejected in lengths:
        end = at + prompt
        stretches += [(prompt, (0, 0, at)), (chosen, (at, end, end)), (rejected, (at, end, end + chosen))]
        at = end + chosen + rejected
    counts = jnp.array([n for n, _ in stretches])
    row = jnp.repeat(jnp.array([s for _, s in stretches], jnp.int32), counts, axis=0, total_repeat_length=at)
    whole = key_ranges(Visibility(*row.T[:, None]))
    return KeyRanges(*(jnp.concatenate(a) for a in zip(whole, within(whole, jnp.int32(100)), strict=True)))
