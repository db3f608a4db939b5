r"""Rotary position embeddings, all frequency rules.

Frequencies are computed in float64 on the host; angles in float32 (float64 when the model computes in float64).
Halves of the rotary channels are rotated against each other (the "rotate half" layout of Hugging Face):
``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)``; in some families each channel against its neighbour.

Sources: RoFormer (arXiv 2104.09864); linear scaling (2306.15595); NTK-aware "dynamic"; YaRN (2309.00071);
the Llama 3.1 rule; LongRoPE (2402.13753).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ches_jax.models.config import RopeConfig


def base_frequencies(theta: float, rotary_dim: int) -> np.ndarray:
    """``theta ** (-2i / rotary_dim)`` for i in 0 .. rotary_dim/2 - 1."""
    return theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def _yarn(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Fast channels keep their frequency, slow ones are divided by ``factor``, a linear ramp between."""

    def channel(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(rope.rotary_dim // 2) - low) / width, 0, 1)
    return base * (1 - ramp) + base / rope.factor * ramp


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Divide long wavelengths by ``factor``, keep short ones, blend in the band between."""
    turns = rope.original_max_positions * base / (2 * math.pi)
    band = rope.high_freq_factor - rope.low_freq_factor
    # without a band between (Llama 4) the rule is a step
    keep = np.clip((turns - rope.low_freq_factor) / band, 0, 1) if band else (turns > rope.low_freq_factor) * 1.0
    return base * keep + base / rope.factor * (1 - keep)


def frequencies(rope: RopeConfig) -> np.ndarray:
    """Angular step per position of each rotary channel pair, for sequences within ``length_threshold``."""
    base = base_frequencies(rope.theta, rope.rotary_dim)
    match rope.kind:
        case "linear":
            return base / rope.factor
        case "yarn":
            return _yarn(rope, base)
        case "llama3":
            return _llama3(rope, base)
        case "proportional":
            rotating = np.arange(rope.rotary_dim // 2) < rope.rotating_pairs
            return np.where(rotating, base, 0.0) / rope.factor
        case "longrope":
            return base / np.asarray(rope.short_factor, np.float64)
        case _:
            return base


def _frequencies_by_length(rope: RopeConfig, lengths: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T R"]:
    """Frequencies of tokens whose sequence has ``lengths`` tokens in all (``dynamic`` and ``longrope``)."""
    if rope.kind == "longrope":
        short = jnp.asarray(frequencies(rope), dtype)
        long = jnp.asarray(
            base_frequencies(rope.theta, rope.rotary_dim) / np.asarray(rope.long_factor, np.float64),
            dtype,
        )
        return jnp.where((lengths > rope.original_max_positions)[..., None], long[None, None], short[None, None])
    dim = rope.rotary_dim
    n = jnp.maximum(lengths, rope.max_positions).astype(dtype)
    ratio = (rope.factor * n / rope.max_positions) - (rope.factor - 1)
    # theta' = theta * ratio ** (dim / (dim - 2)), so each frequency is multiplied by a power of the ratio
    exponent = jnp.asarray(-np.arange(0, dim, 2) / (dim - 2), dtype)
    return jnp.asarray(frequencies(rope), dtype)[None, None] * ratio[..., None] ** exponent[None, None]


def tables(
    rope: RopeConfig, positions: Int[Array, "B T"], lengths: Int[Array, "B T"], dtype: jnp.dtype
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosine and sine of the angles, R = rotary_dim / 2, times the attention factor.

    Args:
      rope: which frequencies.
      positions: position of each token in its own sequence.
      lengths: length of the sequence each token belongs to; only read by ``dynamic`` and ``longrope``.
      dtype: float32 or float64.
    """
    if rope.length_threshold is None:
        steps = jnp.asarray(frequencies(rope), dtype)[None, None]
    else:
        steps = _frequencies_by_length(rope, lengths, dtype)
    angles = positions.astype(dtype)[..., None] * steps
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"], *, neighbours: bool = False
) -> Float[Array, "B T N H"]:
    """Rotate the first 2R channels of every head; the rest pass through.

    Args:
      x: queries or keys.
      cos: of the angles.
      sin: of the angles.
      neighbours: pairs are channels (0, 1), (2, 3), ... instead of (0, R), (1, R + 1), ...
    """
    half = cos.shape[-1]
    cos, sin = cos.astype(x.dtype)[:, :, None], sin.astype(x.dtype)[:, :, None]
    if neighbours:
        x1, x2, rest = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
        pairs = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
        return jnp.concatenate([pairs.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)
