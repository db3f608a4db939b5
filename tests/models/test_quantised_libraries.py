"""Our reading of quantised weights beside the libraries that write them; each where it is installed (`pip install`
compressed-tensors, bitsandbytes, auto-gptq, autoawq; all need torch)."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
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


@pytest.fixture
def part_of(monkeypatch: pytest.MonkeyPatch):
    """A module of an installed package without what its ``__init__`` files import (kernels, older transformers)."""

    def load(name: str) -> Any:
        parents = name.split(".")[:-1]
        found = importlib.util.find_spec(parents[0])
        if found is None or not found.submodule_search_locations:
            pytest.skip(f"needs {parents[0]}")
        folder = Path(found.submodule_search_locations[0]).parent
        for i in range(1, len(parents) + 1):
            bare = ModuleType(".".join(parents[:i]))
            bare.__path__ = [str(folder.joinpath(*parents[:i]))]
            monkeypatch.setitem(sys.modules, bare.__name__, bare)
        return importlib.import_module(name)

    return load


def grid(bits: int, groups: int) -> tuple[Any, Any]:
    """Scales and whole zero points, [outputs, groups]."""
    generator = torch.Generator().manual_seed(2)
    scale = (torch.rand(WIDTH, groups, generator=generator) * 0.01 + 0.002).half().float()
    return scale, torch.randint(1, 2**bits, (WIDTH, groups), generator=generator).float()


def linear_on(scale: Any, zero: Any, of_input: Any, bits: int) -> Any:
    """A layer whose weights are on the grid."""
    q = torch.randint(0, 2**bits, (WIDTH, len(of_input)), generator=torch.Generator().manual_seed(3)).float()
    layer = torch.nn.Linear(len(of_input), WIDTH, bias=False)
    layer.weight.data = (scale[:, of_input] * (q - zero[:, of_input])).half()
    return layer.half()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [32, -1])
def test_gptq_as_autogptq_packs_and_reads_it(part_of: Any, bits: int, size: int, ordered: bool, tmp_path: Path):
    module = part_of("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    inputs = 64
    groups = 1 if size == -1 else inputs // size
    scale, zero = grid(bits, groups)
    of_input = torch.arange(inputs) // (inputs // groups)
    if ordered:
        of_input = of_input[torch.randperm(inputs, generator=torch.Generator().manual_seed(4))]
    layer = linear_on(scale, zero, of_input, bits)
    packed = module.QuantLinear(bits, size, inputs, WIDTH, False)
    packed.pack(layer, scale.half(), zero.half(), of_input.int())
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": ordered}
    ours = read(tmp_path, tensors, settings, "float16")
    equal(ours, packed(torch.eye(inputs).half()).T)
    equal(ours, layer.weight.data)


@pytest.mark.parametrize("size", [32, 64])
def test_awq_as_autoawq_packs_and_reads_it(part_of: Any, size: int, tmp_path: Path):
    module = part_of("awq.modules.linear.gemm")
    inputs = 64
    scale, zero = grid(4, inputs // size)
    layer = linear_on(scale, zero, torch.arange(inputs) // size, 4)
    packed = module.WQLinear_GEMM.from_linear(layer, 4, size, scales=scale.T.half(), zeros=zero.T)
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    ours = read(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}, "float16")
    equal(ours, module.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, size).T)
    equal(ours, layer.weight.data)
