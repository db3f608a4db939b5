"""Our reading of quantised weights beside the libraries that write them; each where it is installed (`pip install`
compressed-tensors, bitsandbytes; both need torch)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ches_jax.hf.quantised.scheme import dequantised
from ches_jax.hf.quantised.schemes import scheme_of
from ches_jax.hf.tensors import STORED, Tensor, open_files

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow
HEIGHT, WIDTH = 48, 128


def read(folder: Path, tensors: dict[str, Any], settings: dict[str, Any], dtype: str = "bfloat16") -> Tensor:
    """The weight ``m.weight`` of a file with these torch tensors, as we read it."""
    from safetensors.torch import save_file

    save_file({f"m.{name}": value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    scheme = scheme_of({"dtype": dtype, "quantization_config": settings})
    assert scheme is not None
    stored = open_files(folder, [folder / "model.safetensors"], kinds=STORED)
    return dequantised(scheme, stored, "here")["m.weight"]


def equal(ours: Tensor, theirs: Any) -> None:
    assert ours.dtype == str(theirs.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(ours.read().astype(np.float32), theirs.float().numpy())


def weight(dtype: Any) -> Any:
    return (torch.randn(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
        ("naive-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("naive-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("naive-quantized", {"num_bits": 8, "strategy": "tensor", "type": "float"}),
        ("naive-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}),
        ("naive-quantized", {"num_bits": 8, "strategy": "block", "block_structure": [16, 32], "type": "float"}),
    ],
)
def test_compressed_tensors(form: str, settings: dict[str, Any], tmp_path: Path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    compressors = pytest.importorskip("compressed_tensors.compressors.base")
    args = quantization.QuantizationArgs(**settings)
    w = weight(torch.bfloat16)
    if settings["strategy"] == "group":
        parts = w.reshape(HEIGHT, -1, settings["group_size"])
        low, high = parts.amin(-1), parts.amax(-1)
    elif settings["strategy"] == "channel":
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    elif settings["strategy"] == "block":
        rows, columns = settings["block_structure"]
        parts = w.reshape(HEIGHT // rows, rows, WIDTH // columns, columns)
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    else:
        low, high = w.min().reshape(1), w.max().reshape(1)
    scale, zero = helpers.calculate_qparams(low, high, args)
    state = {"weight": w, "weight_scale": scale.to(w.dtype), "weight_zero_point": zero}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor: Any = compressors.BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    theirs = compressor.decompress(dict(stored), scheme)["weight"]
    ours = read(
        tmp_path,
        stored,
        {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": {"weights": args.model_dump(mode="json")}},
        },
    )
    equal(ours, theirs)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bitsandbytes_nf4(nested: bool, dtype: str, tmp_path: Path):
    functional = pytest.importorskip("bitsandbytes.functional")
    reference = pytest.importorskip("bitsandbytes.backends.default.ops")
    w = weight(getattr(torch, dtype))
    packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    ours = read(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    # its processor kernels for 16 bits may round the table first; the reference one does not
    code = state.code
    largest = state.absmax
    if nested:
        largest = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    theirs = reference._dequantize_4bit_compute(
        packed.reshape(-1), largest.float(), code, state.blocksize, w.shape, w.dtype
    )
    equal(ours, theirs)


def test_bitsandbytes_int8(tmp_path: Path):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(torch.float16)
    q, largest, _ = functional.int8_vectorwise_quant(w)
    ours = read(
        tmp_path, {"weight": q, "SCB": largest}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "float32"
    )
    equal(ours, functional.int8_vectorwise_dequant(q, largest))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_blocks_as_transformers(dtype: str, tmp_path: Path):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    q = weight(torch.float32).to(torch.float8_e4m3fn)
    s = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 0.01
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(q, s, output_dtype=getattr(torch, dtype))
    settings = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
    equal(read(tmp_path, {"weight": q, "weight_scale_inv": s}, settings, dtype), theirs)


def test_mxfp4_as_transformers(tmp_path: Path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    from ches_jax.hf.quantised.mxfp4 import Mxfp4

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(110, 140, (2, 6, 3), generator=generator, dtype=torch.uint8)
    from safetensors.torch import save_file

    save_file({"up_blocks": blocks, "up_scales": exponents}, tmp_path / "model.safetensors")
    stored = open_files(tmp_path, [tmp_path / "model.safetensors"], kinds=STORED)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, exponents)
    equal(dequantised(Mxfp4("bfloat16"), stored, "here")["up"], theirs)
