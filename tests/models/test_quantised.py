"""Quantised weights are read as the numbers their format says they mean; what is not wholly described is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ches_jax.errors import CheckpointError
from ches_jax.hf.quantised.fp8 import Fp8
from ches_jax.hf.quantised.mxfp4 import Mxfp4
from ches_jax.hf.quantised.scheme import dequantised
from ches_jax.hf.quantised.schemes import scheme_of
from ches_jax.hf.tensors import STORED, open_files
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.checkpoint.save import save_pretrained
from ches_jax.models.checkpoint.stored_names import model_tensors
from ches_jax.models.decoder import named_parameters
from ches_jax.models.families.registry import decoder_config

from .quantise import FORMATS, FP4, Format, Random
from .test_strict import weights

TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "dtype": "float32",
}
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def model(how: Format, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Config, stored tensors and the numbers they mean, of a Llama with every matrix of the layers quantised."""
    rng = np.random.default_rng(seed)
    stored, means = {}, {}
    for name, value in weights(TEXT).items():
        module = name.removesuffix(".weight")
        if ".layers." in name and name.endswith("_proj.weight"):
            written = how.write(rng, *value.shape)
            stored |= {f"{module}.{part}": np.ascontiguousarray(array) for part, array in written.parts.items()}
            means[name] = written.means
        else:
            stored[name] = means[name] = rng.normal(size=value.shape).astype(np.float32)
    return TEXT | {"quantization_config": how.config}, stored, means


@pytest.mark.parametrize("kind", FORMATS)
def test_every_number_is_what_the_format_says(kind: str, write_model: Any):
    raw, stored, means = model(FORMATS[kind])
    tensors = model_tensors(write_model(raw, stored))
    assert tensors.keys() == means.keys()
    for name, value in means.items():
        read = tensors[name].read()
        assert read.dtype == value.dtype, name
        assert read.shape == value.shape, name
        if kind == "int8":  # times 1/127 in float32: one rounding more than the division
            np.testing.assert_allclose(read, value, rtol=2e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(read, value, err_msg=name)
        rows = tensors[name].read((slice(3, 8), *(slice(2, 7) for _ in value.shape[1:])))
        np.testing.assert_array_equal(rows, read[(slice(3, 8), *(slice(2, 7) for _ in value.shape[1:]))], err_msg=name)


def test_a_quantised_model_computes_with_them_and_is_exported_without(write_model: Any, tmp_path: Path):
    raw, stored, means = model(FORMATS["awq"])
    directory = write_model(raw, stored)
    loaded = load_model(directory)
    np.testing.assert_array_equal(named_parameters(loaded)["layers.mlp.down_proj.weight"][0], means[f"{DOWN}.weight"])
    save_pretrained(loaded, tmp_path / "out", like=directory)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, value in means.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    with pytest.raises(CheckpointError, match="no multimodal directory"):
        save_pretrained(loaded, tmp_path / "whole", like=directory, whole=True)


def test_a_quantised_text_part_is_read_and_not_written_as_half_of_a_whole(write_model: Any, tmp_path: Path):
    raw, stored, means = model(FORMATS["nf4"])
    settings = raw.pop("quantization_config")
    inside = {f"language_model.{name}": value for name, value in stored.items()}
    tower = {
        "vision_tower.q.weight": np.zeros((8, 1), np.uint8),
        "vision_tower.q.weight.absmax": np.ones(1, np.float32),
    }
    directory = write_model(
        {"model_type": "mistral3", "text_config": raw, "quantization_config": settings, "tie_word_embeddings": False},
        inside | tower,
    )
    loaded = load_model(directory)
    np.testing.assert_array_equal(named_parameters(loaded)["layers.mlp.down_proj.weight"][0], means[f"{DOWN}.weight"])
    with pytest.raises(CheckpointError, match=r"quantised \(bitsandbytes nf4\)"):
        save_pretrained(loaded, tmp_path / "whole", like=directory, whole=True)


def test_mxfp4_experts(tmp_path: Path):
    rng: Random = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 5, 2, 16)).astype(np.uint8)
    exponents = rng.integers(110, 130, (3, 5, 2)).astype(np.uint8)
    save_file({"mlp.up_blocks": blocks, "mlp.up_scales": exponents}, tmp_path / "model.safetensors")
    expected = np.zeros((3, 64, 5), np.float32)
    for e, row, group, byte in np.ndindex(blocks.shape):
        for place, number in enumerate((blocks[e, row, group, byte] & 15, blocks[e, row, group, byte] >> 4)):
            sign = -1.0 if number & 8 else 1.0
            value = sign * FP4[number & 7] * 2.0 ** (int(exponents[e, row, group]) - 127)
            expected[e, 32 * group + 2 * byte + place, row] = value
    stored = open_files(tmp_path, [tmp_path / "model.safetensors"], kinds=STORED)
    tensor = dequantised(Mxfp4("bfloat16"), stored, "here")["mlp.up"]
    assert tensor.dtype == "bfloat16"
    np.testing.assert_array_equal(tensor.read().astype(np.float32), expected)
    np.testing.assert_array_equal(
        tensor.read((slice(1, 2), slice(3, 9), slice(0, 2))).astype(np.float32), expected[1:2, 3:9, 0:2]
    )


def test_a_block_of_fp8_has_a_height_and_a_width(tmp_path: Path):
    scales = np.arange(1, 13, dtype=np.float32).reshape(4, 3)  # of blocks of 2 rows and 4 columns
    parts = {"q.weight": np.ones((8, 12), ml_dtypes.float8_e4m3fn), "q.weight_scale_inv": scales}
    save_file(parts, tmp_path / "model.safetensors")
    stored = open_files(tmp_path, [tmp_path / "model.safetensors"], kinds=STORED)
    tensor = dequantised(Fp8((2, 4), "float32"), stored, "here")["q.weight"]
    np.testing.assert_array_equal(tensor.read(), scales.repeat(2, 0).repeat(4, 1))


def changed(kind: str, **settings: Any) -> dict[str, Any]:
    return TEXT | {"quantization_config": FORMATS[kind].config | settings}


def of_weights(kind: str, **settings: Any) -> dict[str, Any]:
    config = copy.deepcopy(FORMATS[kind].config)
    group = config["config_groups"]["group_0"]
    group["weights"] |= settings
    return TEXT | {"quantization_config": config}


def of_group(kind: str, **settings: Any) -> dict[str, Any]:
    config = copy.deepcopy(FORMATS[kind].config)
    config["config_groups"]["group_0"] |= settings
    return TEXT | {"quantization_config": config}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (TEXT | {"quantization_config": {"quant_method": "aqlm"}}, "'aqlm'"),
        (changed("gptq", bits=None), "half described: 'bits' is missing"),
        (changed("gptq", group_size=None), "half described: 'group_size' is missing"),
        (changed("gptq", bits=3), "'bits' = 3"),
        (changed("gptq", checkpoint_format="marlin"), "'marlin'"),
        (changed("gptq", dynamic={"-:.*": {}}), "modules are quantised differently"),
        (changed("awq", version="gemv"), "'gemv'"),
        (changed("awq", zero_point=False), "'zero_point' = False"),
        (changed("awq", bits=8), "'bits' = 8"),
        (changed("fp8", activation_scheme="static"), "activations are quantised"),
        (changed("fp8", fmt="e5m2"), "'fmt' = 'e5m2'"),
        (changed("fp8", weight_block_size=[16]), "expected two positive numbers"),
        (changed("nf4", bnb_4bit_quant_type="fp4"), "'bnb_4bit_quant_type' = 'fp4'"),
        (changed("nf4", load_in_4bit=False), "half described: one of 'load_in_4bit'"),
        (changed("int4_group", format="nvfp4-pack-quantized"), "'format' = 'nvfp4-pack-quantized'"),
        (changed("int4_group", format=None), "half described: 'format' is missing"),
        (changed("int4_group", kv_cache_scheme={"num_bits": 8}), "keys and values are quantised"),
        (changed("int4_group", sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
        (changed("int4_group", transform_config={"config_groups": {}}), "stored rotated"),
        (changed("int4_group", config_groups={}), "'config_groups' is empty"),
        (of_group("int8_channel", input_activations={"num_bits": 8}), "activations are quantised"),
        (of_group("int8_channel", weights=None), "'weights' is missing"),
        (of_weights("int4_group", num_bits=3), "'num_bits' = 3"),
        (of_weights("int4_group", group_size=None), "'group_size' is missing"),
        (of_weights("int4_group", strategy="tensor_group"), "'tensor_group'"),
        (changed("fp8") | {"dtype": "int8"}, "'dtype' = 'int8'"),
    ],
)
def test_what_is_not_a_way_to_store_weights_is_refused_by_name(raw: dict[str, Any], words: str):
    with pytest.raises(CheckpointError) as e:
        decoder_config(raw, "models/x")
    assert words in str(e.value)
    assert "fp8 with block scales, mxfp4, compressed-tensors" in str(e.value)


@pytest.mark.parametrize(
    ("kind", "part", "words"),
    [
        ("gptq", "scales", "half described: has g_idx, qweight, qzeros and lacks scales"),
        ("gptq_v2_ordered", "g_idx", "half described: has no g_idx"),
        ("awq", "qzeros", "lacks qzeros"),
        ("fp8", "weight_scale_inv", "lacks weight_scale_inv"),
        ("int4_group", "weight_shape", "lacks weight_shape"),
        ("int4_ordered", "weight_g_idx", "has no weight_g_idx"),
        ("int8_zero_points", "weight_zero_point", "has no weight_zero_point"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", "lacks quant_state"),
        ("nf4_nested", "weight.nested_quant_map", "lacks nested_quant_map"),
        ("int8", "SCB", "lacks SCB"),
    ],
)
def test_a_weight_that_is_half_there_is_named(kind: str, part: str, words: str, write_model: Any):
    raw, stored, _ = model(FORMATS[kind])
    del stored[f"{Q}.{part}"]
    with pytest.raises(CheckpointError) as e:
        model_tensors(write_model(raw, stored))
    assert f"{Q}: " in str(e.value)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("kind", "part", "value", "words"),
    [
        ("gptq", "scales", np.ones((3, 32), np.float16), "scales has shape (3, 32); expected (2, 32)"),
        ("gptq", "qweight", np.ones((2, 32), np.int64), "qweight is stored as int64"),
        ("gptq", "g_idx", np.full(16, 7, np.int32), "g_idx names group 7; there are 2"),
        ("awq", "qzeros", np.ones((2, 5), np.int32), "qzeros has shape (2, 5)"),
        ("fp8", "weight_scale_inv", np.ones((2, 2), np.float32), "weight_scale_inv has shape"),
        ("fp8", "weight", np.ones((32, 16), ml_dtypes.float8_e5m2), "stored as float8_e5m2"),
        ("int4_group", "weight_packed", np.ones((32, 3), np.int32), "weight_packed has shape (32, 3)"),
        ("int4_ordered", "weight_g_idx", np.zeros(16, np.int32), "does not number the groups"),
        ("nf4", "weight.absmax", np.ones(3, np.float32), "absmax has shape (3,); expected (8,)"),
        ("nf4", "weight", np.ones((9, 1), np.uint8), "does not hold 512 numbers"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", np.frombuffer(b"{", np.uint8), "is no JSON"),
        ("int8", "weight_format", np.array(2, np.uint8), "weight_format is not"),
    ],
)
def test_parts_that_do_not_fit_are_named(kind: str, part: str, value: np.ndarray, words: str, write_model: Any):
    raw, stored, _ = model(FORMATS[kind])
    stored[f"{Q}.{part}"] = value
    with pytest.raises(CheckpointError) as e:
        model_tensors(write_model(raw, stored))
    assert f"{Q}: " in str(e.value)
    assert words in str(e.value)


def test_a_zero_point_with_two_readings_is_refused(write_model: Any):
    raw, stored, _ = model(FORMATS["gptq"])
    stored[f"{Q}.qzeros"] = np.full_like(stored[f"{Q}.qzeros"], -1)
    with pytest.raises(CheckpointError, match="zero point 0 and others as 16"):
        load_model(write_model(raw, stored))


def test_bytes_without_a_scheme_are_no_weights(write_model: Any):
    _, stored, _ = model(FORMATS["int8_channel"])
    stored = {name: value for name, value in stored.items() if not name.endswith("weight_scale")}
    with pytest.raises(CheckpointError, match=r"stored as int8, and config\.json has no 'quantization_config'"):
        load_model(write_model(TEXT, stored))


def test_a_run_names_the_scheme(write_model: Any):
    from ches_jax.inputs import Opener

    raw, stored, _ = model(FORMATS["gptq_v2_ordered"])
    opener = Opener()
    opener.model(write_model(raw, stored))
    assert opener.identity()["model_quantisation"] == "gptq v2 (4 bits, groups of 8, activation order)"
    assert scheme_of(TEXT) is None
