"""Weights written in each quantised format, after its documentation, one number at a time; and what they mean."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""Table of QLoRA (arXiv:2305.14314, appendix E)."""
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
Random = np.random.Generator


class Written(NamedTuple):
    """One weight: its parts by the end of their names, and the numbers it means."""

    parts: dict[str, np.ndarray]
    means: np.ndarray


class Format(NamedTuple):
    """How to write a weight, and what the config says."""

    config: dict[str, Any]
    write: Callable[[Random, int, int], Written]


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of small numbers in 32-bit words, one at a time, lowest bits first."""
    per = 32 // bits
    out = np.zeros((numbers.shape[0], -(-numbers.shape[1] // per)), np.uint32)
    for (row, k), number in np.ndenumerate(numbers):
        out[row, k // per] |= np.uint32(int(number) << (bits * (k % per)))
    return out.view(np.int32)


def scales(rng: Random, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return rng.uniform(0.002, 0.02, shape).astype(dtype)


def fp8_blocks(block: int) -> Callable[[Random, int, int], Written]:
    def write(rng: Random, height: int, width: int) -> Written:
        q = rng.normal(size=(height, width)).astype(ml_dtypes.float8_e4m3fn)
        s = scales(rng, (-(-height // block), -(-width // block)), np.float32)
        means = np.zeros((height, width), np.float32)
        for i, j in np.ndindex(means.shape):
            means[i, j] = np.float32(q[i, j]) * s[i // block, j // block]
        return Written({"weight": q, "weight_scale_inv": s}, means)

    return write


def gptq(bits: int, size: int, version: int, ordered: bool) -> Callable[[Random, int, int], Written]:
    def write(rng: Random, height: int, width: int) -> Written:
        most = (1 << bits) - 1
        group = size if size > 0 else width
        groups = -(-width // group)
        q = rng.integers(0, most + 1, (height, width))
        z = rng.integers(1, most + 1, (height, groups))
        s = scales(rng, (height, groups), np.float16)
        of = np.arange(width) // group
        of = rng.permutation(of) if ordered else of
        means = np.zeros((height, width), np.float16)
        for o, i in np.ndindex(means.shape):
            means[o, i] = s[o, of[i]] * np.float16(q[o, i] - z[o, of[i]])
        parts = {
            "qweight": np.ascontiguousarray(words(q, bits).T),
            "qzeros": words(z.T - (version == 1), bits),
            "scales": np.ascontiguousarray(s.T),
            "g_idx": of.astype(np.int32),
        }
        return Written(parts, means)

    return write


def awq(size: int) -> Callable[[Random, int, int], Written]:
    def write(rng: Random, height: int, width: int) -> Written:
        groups = width // size
        q, z = rng.integers(0, 16, (height, width)), rng.integers(0, 16, (height, groups))
        s = scales(rng, (height, groups), np.float16)
        means = np.zeros((height, width), np.float16)
        for o, i in np.ndindex(means.shape):
            means[o, i] = np.float16(q[o, i] - z[o, i // size]) * s[o, i // size]
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def pack(columns: np.ndarray) -> np.ndarray:
            shuffled = np.concatenate([columns[:, c : c + 8][:, order] for c in range(0, columns.shape[1], 8)], axis=1)
            return words(shuffled, 4)

        return Written({"qweight": pack(q.T), "qzeros": pack(z.T), "scales": np.ascontiguousarray(s.T)}, means)

    return write


def compressed(
    form: str, bits: int, strategy: str, group: int = 0, symmetric: bool = True, ordered: bool = False
) -> Format:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    weights |= {"group_size": group or None, "dynamic": False, "actorder": "group" if ordered else None}
    if form == "float-quantized":
        weights["type"] = "float"
    if strategy == "block":
        weights["block_structure"] = [8, 8]

    def write(rng: Random, height: int, width: int) -> Written:
        of_row, of_column = np.arange(height), np.zeros(width, int)
        if strategy == "tensor":
            of_row = of_row * 0
        elif strategy == "group":
            of_column = np.arange(width) // group
            of_column = rng.permutation(of_column) if ordered else of_column
        elif strategy == "block":
            of_row, of_column = of_row // 8, np.arange(width) // 8
        grid = (of_row.max() + 1, of_column.max() + 1)
        s = scales(rng, grid, ml_dtypes.bfloat16)
        half = 1 << (bits - 1)
        if form == "float-quantized":
            q = rng.normal(size=(height, width)).astype(ml_dtypes.float8_e4m3fn)
        else:
            q = rng.integers(-half, half, (height, width)).astype(np.int8)
        z = np.zeros(grid, np.int8) if symmetric else rng.integers(-half, half, grid).astype(np.int8)
        means = np.zeros((height, width), ml_dtypes.bfloat16)
        for i, j in np.ndindex(means.shape):
            at = of_row[i], of_column[j]
            means[i, j] = (q[i, j].astype(s.dtype) - z[at].astype(s.dtype)) * s[at]
        parts = {"weight_scale": s if strategy != "tensor" else s.reshape(1)}
        if form == "pack-quantized":
            parts |= {"weight_packed": words(q.astype(int) + half, bits), "weight_shape": np.array([height, width])}
            if not symmetric:
                parts["weight_zero_point"] = np.ascontiguousarray(words(z.T.astype(int) + half, bits).T)
            if ordered:
                parts["weight_g_idx"] = of_column.astype(np.int32)
        else:
            parts["weight"] = q
            if not symmetric:
                parts["weight_zero_point"] = z
        return Written(parts, means)

    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    return Format(config, write)


def nf4(nested: bool, size: int = 64) -> Callable[[Random, int, int], Written]:
    def write(rng: Random, height: int, width: int) -> Written:
        count = height * width
        q = rng.integers(0, 16, count)
        blocks = -(-count // size)
        largest = rng.uniform(0.1, 1, blocks).astype(np.float32)
        state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": [height, width]}
        parts: dict[str, np.ndarray] = {"weight.quant_map": NF4, "weight.absmax": largest}
        if nested:
            codes = rng.integers(0, 256, blocks).astype(np.uint8)
            table, outer = np.linspace(-1, 1, 256).astype(np.float32), rng.uniform(0.1, 1, -(-blocks // 4))
            outer, offset = outer.astype(np.float32), 0.625
            largest = np.array([table[c] * outer[k // 4] + np.float32(offset) for k, c in enumerate(codes)], np.float32)
            parts |= {"weight.absmax": codes, "weight.nested_absmax": outer, "weight.nested_quant_map": table}
            state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": offset}
        even = np.append(q, 0) if count % 2 else q
        parts["weight"] = ((even[::2] << 4) | even[1::2]).astype(np.uint8)[:, None]
        parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        means = np.array([NF4[n] * largest[k // size] for k, n in enumerate(q)], np.float32)
        return Written(parts, means.reshape(height, width).astype(ml_dtypes.bfloat16))

    return write


def int8_rows(rng: Random, height: int, width: int) -> Written:
    q = rng.integers(-127, 128, (height, width)).astype(np.int8)
    largest = rng.uniform(0.1, 1, height).astype(np.float32)
    means = q.astype(np.float32) * largest[:, None] * np.float32(1 / 127)
    return Written({"weight": q, "SCB": largest, "weight_format": np.array(0, np.uint8)}, means)


def gptq_config(bits: int, size: int, version: int, ordered: bool) -> dict[str, Any]:
    form = {} if version == 1 else {"checkpoint_format": "gptq_v2"}
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": ordered, "sym": False, **form}


GPTQ = {
    "gptq": (4, 8, 1, False),
    "gptq_v2_ordered": (4, 8, 2, True),
    "gptq_8bit_one_group": (8, -1, 1, False),
    "gptq_2bit": (2, 16, 2, False),
}
FORMATS: dict[str, Format] = {
    "fp8": Format({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [12, 12]}, fp8_blocks(12)),
    **{name: Format(gptq_config(*how), gptq(*how)) for name, how in GPTQ.items()},
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}, awq(8)),
    "int4_group": compressed("pack-quantized", 4, "group", 8),
    "int4_zero_points": compressed("pack-quantized", 4, "group", 8, symmetric=False),
    "int4_ordered": compressed("pack-quantized", 4, "group", 8, ordered=True),
    "int8_channel": compressed("int-quantized", 8, "channel"),
    "int8_packed": compressed("pack-quantized", 8, "channel", symmetric=False),
    "int8_zero_points": compressed("int-quantized", 8, "channel", symmetric=False),
    "fp8_tensor": compressed("float-quantized", 8, "tensor"),
    "fp8_block": compressed("float-quantized", 8, "block"),
    "nf4": Format({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4(False)),
    "nf4_nested": Format(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4(True)
    ),
    "int8": Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8_rows),
}
