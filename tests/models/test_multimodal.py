"""The text model inside a multimodal directory: found, loaded, written back alone or in its place."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ches_jax import notices
from ches_jax.convert import ConvertConfig, convert
from ches_jax.errors import CheckpointError
from ches_jax.hf.text_part import LEFT_OUT, SIZES, parts, text_config
from ches_jax.models.adapters.peft import read_adapter
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.checkpoint.save import save_pretrained

from .rows import ROWS
from .test_strict import family, weights

VISION = {
    "vision_tower.layers.0.fc.weight": np.ones((3, 5), np.float32),
    "vision_tower.embeddings.position_ids": np.arange(4)[None],
    "multi_modal_projector.linear.weight": np.full((5, 12), 2.0, np.float32),
}
LAYOUTS = {
    "language_model.model.": "language_model.lm_head.weight",
    "model.language_model.": "lm_head.weight",
    "model.language_model.model.": "model.language_model.lm_head.weight",
    "language_model.": "lm_head.weight",
    "model.text_model.": "lm_head.weight",
}
"""What stands before the text model's names -> the name of the head."""


def tensors(text: dict[str, Any], before: str = "language_model.model.", seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a text model under the names of a multimodal file."""
    rng = np.random.default_rng(seed)
    inner = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in weights(text).items()}
    return {
        LAYOUTS[before] if name.startswith("lm_head") else before + name.removeprefix("model."): value
        for name, value in inner.items()
    }


def wrapped(text: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"model_type": "mistral3", "text_config": text, "vision_config": {"hidden_size": 5}, **extra}


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    notices.notice.cache_clear()
    caplog.set_level(logging.WARNING, "ches_jax")
    return caplog


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_sizes_that_a_nested_config_leaves_out_are_those_of_its_class(kind: str):
    """Of a multimodal model alone: one by itself is saved with its sizes, and without one it is damaged."""
    CONFIG_MAPPING = pytest.importorskip("transformers").CONFIG_MAPPING
    theirs = CONFIG_MAPPING[kind](vocab_size=77)
    written = {"model_type": kind, "vocab_size": 77}
    found = text_config(wrapped(written))
    assert [found[size] for size in SIZES] == [getattr(theirs, size) for size in SIZES]
    assert text_config(written) == written
    assert CONFIG_MAPPING[kind]().vocab_size == LEFT_OUT[kind][0]


@pytest.mark.parametrize("before", LAYOUTS)
def test_a_text_checkpoint_comes_out_of_every_layout(before: str, write_model: Any, tmp_path: Path, heard: Any):
    text = family("mistral")
    given = tensors(text, before)
    inside = write_model(wrapped(text, tie_word_embeddings=False, eos_token_id=7), given | VISION)
    save_pretrained(load_model(inside), tmp_path / "out", like=inside)
    # the ids of positions are a buffer that no model of ours reads
    said = "2 tensors that are not of the text model are left out: multi_modal_projector (1), vision_tower (1)"
    assert heard.text.count(said) == 1
    plain = {
        name if name == "lm_head.weight" else "model." + name.removeprefix(before): value
        for name, value in ((n if n != LAYOUTS[before] else "lm_head.weight", v) for n, v in given.items())
    }
    same(plain, load_file(tmp_path / "out" / "model.safetensors"))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == "mistral"
    assert raw["architectures"] == ["MistralForCausalLM"]
    assert raw["eos_token_id"] == 7
    assert load_model(tmp_path / "out").config == load_model(inside).config


def test_all_of_it_is_written_with_the_text_part_replaced(write_model: Any, tmp_path: Path):
    text = family("gemma", tie_word_embeddings=True)
    given = tensors(text)
    given["language_model.lm_head.weight"] = given["language_model.model.embed_tokens.weight"]  # stored twice
    inside = write_model(wrapped(text, tie_word_embeddings=True), given | VISION)
    (inside / "preprocessor_config.json").write_text("{}")
    model = load_model(inside)
    save_pretrained(model, tmp_path / "same", like=inside, whole=True)
    same(given | VISION, load_file(tmp_path / "same" / "model.safetensors"))
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == json.loads(
        (inside / "config.json").read_text()
    )
    assert (tmp_path / "same" / "preprocessor_config.json").exists()
    model.embed_tokens.weight[...] = model.embed_tokens.weight[...] + 1
    save_pretrained(model, tmp_path / "other", like=inside, whole=True, dtype="bfloat16")
    after = load_file(tmp_path / "other" / "model.safetensors")
    expected = (given["language_model.model.embed_tokens.weight"] + 1).astype(
        after["language_model.lm_head.weight"].dtype
    )
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        np.testing.assert_array_equal(after[name], expected, err_msg=name)
    np.testing.assert_array_equal(
        after["vision_tower.embeddings.position_ids"], VISION["vision_tower.embeddings.position_ids"]
    )
    raw = json.loads((tmp_path / "other" / "config.json").read_text())
    assert raw["dtype"] == raw["text_config"]["dtype"] == "bfloat16"


def test_all_of_a_text_model_is_no_more_than_that(write_model: Any, tmp_path: Path):
    directory = write_model(family("llama"), weights(family("llama")))
    with pytest.raises(CheckpointError, match=r"no multimodal directory.*leave out --whole"):
        save_pretrained(load_model(directory), tmp_path / "out", like=directory, whole=True)
    assert not (tmp_path / "out").exists()


def test_what_is_of_no_known_part_is_refused_by_name(write_model: Any):
    text = family("llama")
    odd = {"model.third_eye.weight": np.ones(3, np.float32)}
    with pytest.raises(CheckpointError, match=r"'model\.third_eye\.weight' matches no parameter"):
        load_model(write_model(wrapped(text, tie_word_embeddings=False), tensors(text) | VISION | odd))


def test_a_file_without_a_text_model_is_one_message(write_model: Any):
    with pytest.raises(CheckpointError, match="no tensor of a text model") as e:
        load_model(write_model(wrapped(family("llama")), VISION))
    assert "\n" not in str(e.value)


def test_one_tensor_under_two_names_is_refused(write_model: Any):
    text = family("llama")
    twice = tensors(text) | {"model.language_model.norm.weight": np.ones(12, np.float32)}
    with pytest.raises(CheckpointError, match="same parameter"):
        load_model(write_model(wrapped(text, tie_word_embeddings=False), twice))


@pytest.mark.parametrize(
    ("outside", "inside", "tied"),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False), (None, None, None)],
)
def test_what_is_written_outside_decides_whether_the_head_is_tied(outside: Any, inside: Any, tied: Any):
    raw = {"model_type": "gemma3", "tie_word_embeddings": outside, "text_config": {"model_type": "gemma3_text"}}
    raw["text_config"] |= {"tie_word_embeddings": inside}
    assert text_config(raw).get("tie_word_embeddings") is tied
    if tied is None:  # mistral3 ties by default, mistral does not
        assert text_config(raw | {"model_type": "mistral3"})["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    "name",
    [
        "model.visual.blocks.0.attn.qkv.weight",
        "vision_model.patch_embedding.linear.weight",
        "multi_modal_projector.linear_1.weight",
        "model.embed_vision.embedding_projection.weight",
        "model.audio_tower.layers.0.weight",
        "model.connector.modality_projection.proj.weight",
        "image_newline",
        "mtp.layers.0.mlp.up_proj.weight",
    ],
)
def test_known_parts(name: str):
    assert parts([name]).other


@pytest.mark.parametrize("before", ["model.language_model.", "language_model.model.", "model."])
def test_an_adapter_made_over_the_whole_model_fits_its_text_part(before: str, write_model: Any, tmp_path: Path):
    text = family("llama")
    directory = write_model(wrapped(text, tie_word_embeddings=False), tensors(text) | VISION)
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    module = f"base_model.model.{before}layers.1.self_attn.q_proj"
    tower = "base_model.model.model.vision_tower.layers.0.fc"
    arrays = {f"{module}.lora_A.weight": np.ones((2, 12)), f"{module}.lora_B.weight": np.ones((24, 2))}
    arrays |= {f"{tower}.lora_A.weight": np.ones((2, 5)), f"{tower}.lora_B.weight": np.ones((3, 2))}
    save_file({name: value.astype(np.float32) for name, value in arrays.items()}, folder / "adapter_model.safetensors")
    adapter = read_adapter(folder, directory)
    assert adapter.arrays["layers.self_attn.q_proj.lora_b"][:, 0, 0].tolist() == [0, 1]


def test_patterns_of_such_an_adapter_are_of_the_names_that_it_was_made_over(write_model: Any, tmp_path: Path):
    """A whole name in ``alpha_pattern`` has the part of the multimodal model in it that text alone has not."""
    text = family("llama")
    directory = write_model(wrapped(text, tie_word_embeddings=False), tensors(text) | VISION)
    module = "model.language_model.layers.1.self_attn.q_proj"
    arrays = {"A": np.ones((2, 12), np.float32), "B": np.ones((24, 2), np.float32)}
    stored = {f"base_model.model.{module}.lora_{part}.weight": value for part, value in arrays.items()}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module]}
    for name, pattern, scale in (("a", module, 6.0), ("b", f"^{module}", 6.0), ("c", "model.layers.1.*", 2.0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": {pattern: 12}}))
        save_file(stored, folder / "adapter_model.safetensors")
        assert read_adapter(folder, directory).spec["layers.self_attn.q_proj"].scale == scale
    two = stored | {name.replace("language_model.", ""): value for name, value in stored.items()}
    save_file(two, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="are of the same module; remove one of the two"):
        read_adapter(tmp_path / "a", directory)


@pytest.mark.parametrize("before", ["model.", "model.language_model."])
def test_experts_in_one_tensor_are_read_and_written_so(before: str, write_model: Any, tmp_path: Path):
    """As the published Qwen 3.5 has them, alone or inside; ``save_pretrained`` of transformers writes one for each."""
    text = family("qwen3_5_moe_text")
    apart = tensors(text, before) if before in LAYOUTS else tensors(text, "language_model.model.")
    apart = {name.replace("language_model.model.", before, 1): value for name, value in apart.items()}
    apart = {"lm_head.weight" if "lm_head" in name else name: value for name, value in apart.items()}
    given = {name: value for name, value in apart.items() if ".experts." not in name}
    for layer in range(2):
        experts = f"{before}layers.{layer}.mlp.experts."
        each = [[apart[f"{experts}{e}.{p}_proj.weight"] for p in ("gate", "up", "down")] for e in range(4)]
        given[f"{experts}gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in each])
        given[f"{experts}down_proj"] = np.stack([down for *_, down in each])
    inside = before != "model."
    raw = {"model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": False} if inside else text
    directory = write_model(raw, given | (VISION if inside else {}))
    model = load_model(directory)
    layer = model.layers.mlp.experts
    np.testing.assert_array_equal(layer.up_proj.weight[1, 3], apart[f"{before}layers.1.mlp.experts.3.up_proj.weight"])
    save_pretrained(model, tmp_path / "out", like=directory, whole=inside)
    same(given | (VISION if inside else {}), load_file(tmp_path / "out" / "model.safetensors"))


SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
VISUAL = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 63}
AROUND: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("Gemma3Config", "gemma3_text", {**SMALL, "model_type": "siglip_vision_model"}),
    "mistral3": ("Mistral3Config", "mistral", {**SMALL, "model_type": "pixtral", "head_dim": 8}),
    "mistral3-ministral3": ("Mistral3Config", "ministral3", {**SMALL, "model_type": "pixtral", "head_dim": 8}),
    "qwen3_5": ("Qwen3_5Config", "qwen3_5_text", VISUAL),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", "qwen3_5_moe_text", VISUAL),
    "gemma4": ("Gemma4Config", "gemma4_text", {**SMALL, "head_dim": 8, "num_key_value_heads": 2}),
    "llama4": ("Llama4Config", "llama4_text", {**SMALL, "vision_output_dim": 16, "projector_input_dim": 16}),
}
"""Each multimodal type: its config class, the text model's type in ``rows.py``, its vision tower."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", AROUND)
def test_a_directory_of_transformers_is_read_and_comes_back_whole_and_as_text(kind: str, tmp_path: Path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, text_type, vision = AROUND[kind]
    row = next(row for row in ROWS if row.family == text_type)
    text = {"model_type": text_type, **row.base}
    config = getattr(transformers, name)(text_config=copy.deepcopy(text), vision_config=vision)
    plain: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, **plain).eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape)
            p.add_(0.3 * noise) if p.ndim < 2 else p.copy_(noise * p.shape[-1] ** -0.5)
    ids = np.random.default_rng(0).integers(3, 90, (1, 32))

    def logits(any_model: Any) -> np.ndarray:
        # the outer forward pass of Llama 4 asks its text model for outputs of pictures
        inner = any_model.language_model if kind == "llama4" and hasattr(any_model, "vision_model") else any_model
        with torch.no_grad():
            return inner(input_ids=torch.tensor(ids)).logits.numpy()

    expected = logits(model)
    model.save_pretrained(tmp_path / "in")
    actual = np.asarray(load_model(tmp_path / "in")(ids.astype(np.int32)))
    np.testing.assert_allclose(actual, expected, atol=5 * row.tolerance * np.abs(expected).max())
    given = load_file(tmp_path / "in" / "model.safetensors")
    assert any(parts([n]).other for n in given)
    convert(ConvertConfig(model=str(tmp_path / "in"), out=tmp_path / "whole", whole=True))
    convert(ConvertConfig(model=str(tmp_path / "in"), out=tmp_path / "text"))
    same(given, load_file(tmp_path / "whole" / "model.safetensors"))
    for directory, auto in (("whole", "AutoModelForImageTextToText"), ("text", "AutoModelForCausalLM")):
        again = getattr(transformers, auto).from_pretrained(tmp_path / directory, **plain).eval()
        np.testing.assert_array_equal(logits(again), expected)


def test_the_golden_directory_comes_back_bit_for_bit(golden: Path, tmp_path: Path):
    given = golden / "gemma3_multimodal" / "policy"
    model = load_model(given)
    save_pretrained(model, tmp_path / "whole", like=given, whole=True)
    before, after = (load_file(d / "model.safetensors") for d in (given, tmp_path / "whole"))
    same(before, after)
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {p.name for p in given.iterdir()}
    save_pretrained(model, tmp_path / "text", like=given)
    same(
        {n.removeprefix("language_model."): v for n, v in before.items() if n.startswith("language_model.")},
        load_file(tmp_path / "text" / "model.safetensors"),
    )
    shutil.rmtree(tmp_path / "whole")
