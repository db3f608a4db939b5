"""Which attention is computed: the fastest that the device has, or the one that is named.

dense       jax.numpy, the whole mask: anywhere
blocks      jax.numpy, ``block_sparse``, skips blocks in which no query sees a key: anywhere
pallas-tpu  ``pallas_tpu``
pallas-gpu  ``pallas_gpu``

``NAME:interpret`` runs a kernel of another device in emulation, which is slow: for debugging and tests. Before a kernel
is used it is compared with ``dense`` on the device. Training uses ``with_gradient``: only the TPU's kernel has one.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ches_jax.errors import ChesError
from ches_jax.models.attention import dense
from ches_jax.models.attention.block_sparse import blocks, forward_blocks
from ches_jax.models.attention.dense import Attend, AttentionInputs, AttentionParams
from ches_jax.models.attention.mask import KeyRanges, Visibility, key_ranges, within
from ches_jax.models.config import DecoderConfig
from ches_jax.models.platform import platform

AUTO, INTERPRET = "auto", ":interpret"
NO_SINKS = "it has no attention sinks, which this model's heads have"
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
    """Query heads of a key/value head, the most of any layer."""
    sinks: bool
    """Whether heads have sinks."""


class Choice(NamedTuple):
    """The attention that was chosen, and why faster ones were not."""

    name: str
    attend: Attend
    rejected: tuple[str, ...] = ()


def _tpu(interpret: bool) -> Attend:
    from ches_jax.models.attention import pallas_tpu

    return partial(pallas_tpu.attend, interpret=interpret)


def _gpu(interpret: bool) -> Attend:
    from ches_jax.models.attention import pallas_gpu

    return partial(pallas_gpu.attend, interpret=interpret)


def _why_not_tpu(s: Setting) -> str | None:
    if s.platform != "tpu":
        return "it needs a TPU"
    if s.sinks:
        return NO_SINKS
    if s.dtype not in ("float32", "bfloat16"):
        return f"it computes in float32 or bfloat16, not {s.dtype}"
    if s.group > 32:
        return f"it holds up to 32 query heads of a key/value head, this model has {s.group}"
    return None


def _why_not_gpu(s: Setting) -> str | None:
    if s.capability < 8:
        return "it needs an NVIDIA GPU of compute capability 8.0 or more"
    if s.sinks:
        return NO_SINKS
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
DIFFERENTIABLE = "pallas-tpu"
PLAIN: dict[str, Attend] = {"blocks": blocks, "dense": dense.dense}


def setting_of(config: DecoderConfig, dtype: DTypeLike, device: Any = None) -> Setting:
    """A model on a device; default: the first of this process."""
    device = jax.local_devices()[0] if device is None else device
    try:
        capability = float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD's are names
        capability = 0.0
    shapes = head_shapes(config)
    group, head_dim = (max(sizes) for sizes in zip(*shapes, strict=True))
    dtype_name = jnp.dtype(dtype).name
    return Setting(device.platform, device.device_kind, capability, dtype_name, head_dim, group, config.sinks)


def planned_attention(config: DecoderConfig, dtype: DTypeLike, device: Any) -> Choice:
    """What ``auto`` will be on a device that is not there, where its kernels do as they should."""
    setting = setting_of(config, dtype, device)
    reasons = {name: kernel.why_not(setting) for name, kernel in KERNELS.items()}
    usable = next((name for name, reason in reasons.items() if reason is None), None)
    if usable is None:
        return Choice("blocks", blocks, tuple(f"{name}: {reason}" for name, reason in reasons.items()))
    return Choice(usable, KERNELS[usable].make(False))


def head_shapes(config: DecoderConfig) -> list[tuple[int, int]]:
    """(query heads of a key/value head, channels of a head) of the layers' attention, each once."""
    kinds = [config.of_kind(kind) for kind in dict.fromkeys(config.kinds)]
    return list(dict.fromkeys((c.num_heads // c.num_kv_heads, c.head_dim) for c in kinds))


def choose_attention(name: str, config: DecoderConfig, dtype: DTypeLike) -> Choice:
    """The attention called ``name``; ``auto``: the first kernel that runs and agrees with ``dense``, else ``blocks``.

    Args:
      name: ``auto``, ``dense``, ``blocks``, a kernel of ``KERNELS``, or one emulated (``pallas-tpu:interpret``).
      config: the architecture, whose heads the kernel must take.
      dtype: of the computation.

    Raises:
      ChesError: an unknown name, a kernel that cannot run here or computes something else (with what can).
    """
    setting = setting_of(config, dtype)
    kernels_here = [n for n, kernel in KERNELS.items() if kernel.why_not(setting) is None]
    if name == AUTO:
        faults = []
        for kernel in kernels_here:
            attend = KERNELS[kernel].make(False)
            fault = check(attend, config, setting.dtype)
            if fault is None:
                return Choice(kernel, attend, tuple(faults))
            faults.append(f"{kernel}: {fault}")
        return Choice("blocks", blocks, tuple(faults))
    if name in PLAIN:
        return Choice(name, PLAIN[name])
    kernel = name.removesuffix(INTERPRET)
    usable = ", ".join([*kernels_here, *PLAIN])
    if kernel not in KERNELS:
        raise ChesError(f"--attention {name!r}: expected {AUTO}, {', '.join([*KERNELS, *PLAIN])}")
    interpret = name != kernel
    if setting.sinks:
        raise ChesError(f"--attention {name}: {NO_SINKS}. Available here: {usable}")
    reason = None if interpret else KERNELS[kernel].why_not(setting)
    if reason is not None:
        raise ChesError(
            f"--attention {name}: cannot run on this {setting.device}: {reason}. Available here: {usable} "
            f"(and {kernel}{INTERPRET}, emulated and slow)"
        )
    attend = KERNELS[kernel].make(interpret)
    fault = check(attend, config, setting.dtype)
    if fault is not None:
        raise ChesError(f"--attention {name}: {fault}. Available here: {usable}")
    return Choice(name, attend)


def with_gradient(config: DecoderConfig, dtype: DTypeLike) -> Attend:
    """Attention for training.

    On a TPU its kernel, where it takes the model's heads and has the gradient of ``dense``; on a CPU ``blocks``;
    elsewhere ``query_chunked``, whose control flow is static.
    """
    if platform() == "cpu":
        return blocks
    setting = setting_of(config, dtype)._replace(platform=platform())
    usable = KERNELS[DIFFERENTIABLE].why_not(setting) is None
    # of devices that are not there nothing can be checked
    if usable and (setting.platform != jax.default_backend() or _has_gradient(config, setting.dtype)):
        return KERNELS[DIFFERENTIABLE].make(False)
    return dense.query_chunked


def in_forward_mode() -> Attend:
    """Attention that ``jax.jvp`` passes: on a CPU ``forward_blocks``, elsewhere ``query_chunked``."""
    return forward_blocks if platform() == "cpu" else dense.query_chunked


@lru_cache(maxsize=16)
def _has_gradient(config: DecoderConfig, dtype: str) -> bool:
    """Whether the kernel computes what ``dense`` does, forward and backward; tells why not."""
    attend = KERNELS[DIFFERENTIABLE].make(False)
    with ThreadPoolExecutor(1) as elsewhere:  # a training step asks while it is traced, which is a matter of its thread
        fault = elsewhere.submit(check, attend, config, dtype, gradient=True).result()
    if fault is not None:
        print(f"ches: attention in plain jax for training: {DIFFERENTIABLE}: {fault}", file=sys.stderr)
    return fault is None


def check(attend: Attend, config: DecoderConfig, dtype: str, *, gradient: bool = False) -> str | None:
    """What is wrong with ``attend`` on a small packed batch with the model's heads; None where it equals ``dense``."""
    faults = (_check_heads(attend, heads, config, dtype, gradient) for heads in head_shapes(config))
    return next((fault for fault in faults if fault is not None), None)


def _check_heads(
    attend: Attend, heads: tuple[int, int], config: DecoderConfig, dtype: str, gradient: bool
) -> str | None:
    """``check`` for heads of one shape."""
    ranges = _packed_rows()
    rows, length = ranges.own_start.shape
    shapes = ((rows, length, 1, *heads), (rows, length, 1, heads[1]), (rows, length, 1, heads[1]))
    q, k, v = (
        jax.random.normal(key, shape, jnp.dtype(dtype))
        for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    )
    params = AttentionParams(config.attention_scale, config.attention_softcap)
    exact = jnp.float64 if dtype == "float64" else jnp.float32
    compute = _with_gradients if gradient else _outputs
    exact_inputs = AttentionInputs(q.astype(exact), k.astype(exact), v.astype(exact), ranges)
    expected = jax.jit(partial(compute, dense.dense, params=params))(exact_inputs)
    try:
        found = jax.jit(partial(compute, attend, params=params))(AttentionInputs(q, k, v, ranges))
        error = max(
            float(jnp.abs(a.astype(exact) - b).max() / jnp.abs(b).max()) for a, b in zip(found, expected, strict=True)
        )
    except Exception as e:  # whatever the compiler of a kernel raises
        return f"does not run: {type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"
    limit = TOLERANCE[dtype]
    if error <= limit:
        return None
    what = "output or gradient" if gradient else "output"
    return (
        f"differs from the plain computation by {error:.1e} of the largest {what}, where rounding is below {limit:.0e}"
    )


def _outputs(attend: Attend, inputs: AttentionInputs, params: AttentionParams) -> tuple[jax.Array, ...]:
    return (attend(inputs, params),)


def _with_gradients(attend: Attend, inputs: AttentionInputs, params: AttentionParams) -> tuple[jax.Array, ...]:
    """Outputs, and gradients of half of their sum of squares by queries, keys and values."""
    out, back = jax.vjp(lambda q, k, v: attend(inputs._replace(q=q, k=k, v=v), params), *inputs[:3])
    return out, *back(out)


def _packed_rows() -> KeyRanges:
    """Two rows of three pairs, of lengths that divide nothing; the second has a sliding window."""
    lengths = ((70, 41, 130), (5, 1, 3), (181, 67, 90))  # prompt, chosen, rejected
    segments, start = [], 0
    for prompt, chosen, rejected in lengths:
        end = start + prompt
        segments += [(prompt, (0, 0, start)), (chosen, (start, end, end)), (rejected, (start, end, end + chosen))]
        start = end + chosen + rejected
    counts = jnp.array([n for n, _ in segments])
    row = jnp.repeat(jnp.array([s for _, s in segments], jnp.int32), counts, axis=0, total_repeat_length=start)
    whole = key_ranges(Visibility(*row.T[:, None]))
    return KeyRanges(*(jnp.concatenate(a) for a in zip(whole, within(whole, jnp.int32(100)), strict=True)))
