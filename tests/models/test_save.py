"""What is written is what was read, also where one file mixes dtypes, and in several shards."""

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ches_jax import bundled
from ches_jax.errors import CheckpointError
from ches_jax.hf.directory import fingerprint
from ches_jax.hf.tensors import open_tensors
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.checkpoint.save import save_pretrained

from .test_strict import family, weights


@pytest.fixture
def mixed(write_model: Any) -> Path:
    """A Llama whose norms are float32, whose first layer is float16 and the rest bfloat16."""
    rng = np.random.default_rng(0)
    raw = family("llama")
    dtypes = dict.fromkeys(weights(raw), ml_dtypes.bfloat16)
    dtypes |= {name: np.float32 for name in dtypes if "norm" in name}
    dtypes |= {name: np.float16 for name in dtypes if ".layers.0." in name and "norm" not in name}
    return write_model(raw, {n: rng.normal(size=v.shape).astype(dtypes[n]) for n, v in weights(raw).items()})


def same(a: Path, b: Path) -> None:
    left, right = open_tensors(a), open_tensors(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.read().tobytes() == right[name].read().tobytes(), name


@pytest.mark.parametrize("shard_bytes", [2**30, 2000])
def test_mixed_dtypes_come_back_bit_for_bit(mixed: Path, tmp_path: Path, shard_bytes: int):
    out = tmp_path / "out"
    save_pretrained(load_model(mixed), out, like=mixed, shard_bytes=shard_bytes)
    same(mixed, out)
    assert (out / "model.safetensors.index.json").exists() == (shard_bytes < 2**30)


def test_a_dtype_for_all_is_written_and_reported_in_the_config(mixed: Path, tmp_path: Path):
    out = tmp_path / "out"
    save_pretrained(load_model(mixed), out, like=mixed, dtype="float32")
    assert {t.dtype for t in open_tensors(out).values()} == {"float32"}
    assert '"dtype": "float32"' in (out / "config.json").read_text()


def test_the_fingerprint_tells_equal_weights_from_others(mixed: Path, tmp_path: Path):
    model = load_model(mixed)
    first, second = (save_pretrained(model, tmp_path / n, like=mixed) for n in ("a", "b"))
    assert first == second == fingerprint(tmp_path / "a")
    assert model.norm.weight is not None
    model.norm.weight[...] = model.norm.weight[...] + 1e-6
    assert save_pretrained(model, tmp_path / "c", like=mixed) != first


def test_nothing_is_written_over(mixed: Path, tmp_path: Path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        save_pretrained(load_model(mixed), out, like=mixed)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_chat_templates_go_with_the_tokenizer_wherever_they_lie(tmp_path):
    """A trained model without them would write conversations with tools otherwise than it was trained on, or none."""
    from ches_jax.data.tokenize import load_tokenizer
    from ches_jax.hf.export import copy_tokenizer

    source, copied = tmp_path / "source", tmp_path / "copied"
    shutil.copytree(bundled.model_dir(), source)
    copied.mkdir()
    (source / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    copy_tokenizer(source, copied)
    want = {"default": (source / "chat_template.jinja").read_text(), "tool_use": "with tools"}
    assert load_tokenizer(copied).chat_template == load_tokenizer(source).chat_template == want
    for folder in (source, copied):
        (folder / "chat_template.jinja").unlink()
        (folder / "additional_chat_templates" / "tool_use.jinja").unlink()
    assert load_tokenizer(copied).chat_template == load_tokenizer(source).chat_template == "of the processor"
