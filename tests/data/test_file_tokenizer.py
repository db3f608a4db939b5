"""A tokenizer read without transformers is the one that transformers reads, or is left to it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ches_jax import bundled
from ches_jax.data import file_tokenizer
from ches_jax.data.file_tokenizer import NAMED, REBUILT, FileTokenizer, token_ids
from ches_jax.data.template import RESERVED
from ches_jax.data.tokenize import load_tokenizer, tokenizer_fingerprint
from ches_jax.errors import DataError

TEXTS = ["a", "", "Hello  world!\n\n", "  <s>é😀 1234<|user|> x<eos></s>", "\u200dzero\ttab"]
ASKED = [{"role": "user", "content": "1+1?", "name": None}, {"role": "assistant", "content": "2"}]


def assert_same(light, theirs):
    for special in (True, False):
        assert token_ids(light, TEXTS, add_special_tokens=special) == token_ids(
            theirs, TEXTS, add_special_tokens=special
        )
    for ids in token_ids(theirs, TEXTS, add_special_tokens=True):
        for skip in (True, False):
            assert light.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert tokenizer_fingerprint(light) == tokenizer_fingerprint(theirs)
    for name in NAMED:
        assert (getattr(light, name), getattr(light, f"{name}_id")) == (
            getattr(theirs, name),
            getattr(theirs, f"{name}_id"),
        )
    assert light.chat_template == theirs.chat_template and light.special_tokens_map == theirs.special_tokens_map
    assert len(light) == len(theirs) and light.get_vocab() == theirs.get_vocab()
    assert {i: repr(t) for i, t in light.added_tokens_decoder.items()} == {
        i: repr(t) for i, t in theirs.added_tokens_decoder.items()
    }
    if isinstance(light.chat_template, str):
        for how in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}, {"tools": [{"a": 1}]}):
            assert _written(light, how) == _written(theirs, how)


def _written(tokenizer, how):
    try:
        return tokenizer.apply_chat_template(ASKED, tokenize=False, **how)
    except Exception as error:
        return str(error)


def in_transformers(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


@pytest.fixture
def directory(tmp_path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(bundled.model_dir() / name, tmp_path / name)
    return tmp_path


def with_settings(directory: Path, **changes) -> Path:
    file = directory / "tokenizer_config.json"
    settings = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not ...}
    file.write_text(json.dumps(settings))
    return directory


def test_the_bundled_tokenizer():
    light = load_tokenizer("bundled")
    assert isinstance(light, file_tokenizer.FileTokenizer)
    assert_same(light, in_transformers(bundled.model_dir()))


@pytest.mark.parametrize(
    "changes",
    [
        {
            "eos_token": {"content": "<eos>", "lstrip": False, "__type": "AddedToken"},
            "clean_up_tokenization_spaces": True,
        },
        {"pad_token": None, "extra_special_tokens": ["<|user|>"], "additional_special_tokens": ...},
        {"add_bos_token": False, "add_eos_token": True, "model_max_length": 3},
        {"chat_template": [{"name": "default", "template": "{{ bos_token }}"}, {"name": "x", "template": "y"}]},
    ],
)
def test_settings_that_change_no_id(directory, changes):
    if "chat_template" in changes:
        (directory / "chat_template.jinja").unlink()
    light = file_tokenizer.read(with_settings(directory, **changes))
    assert light is not None
    assert_same(light, in_transformers(directory))


def test_what_is_wrong_in_the_file_and_right_in_transformers(directory):
    """Truncation and padding that a file was saved with are not those of a call; a processor that is not there adds
    nothing."""
    file = directory / "tokenizer.json"
    state = json.loads(file.read_text())
    state["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    state["post_processor"] = None
    file.write_text(json.dumps(state))
    light = file_tokenizer.read(directory)
    assert len(token_ids(light, "a long text", add_special_tokens=True)) > 2
    assert_same(light, in_transformers(directory))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": ...},
        {"eos_token": "<a new one>"},
        {"additional_special_tokens": ["the"]},
        {"split_special_tokens": True},
        {"auto_map": {"AutoTokenizer": ["x.py", None]}},
        {"image_token": "<image>"},
        {"added_tokens_decoder": {"2": {"content": "<eos>", "lstrip": True, "rstrip": False, "special": True}}},
        {"chat_template": 3},
        {"eos_token": 3},
    ],
)
def test_settings_that_transformers_must_read(directory, changes):
    (directory / "chat_template.jinja").unlink()
    assert file_tokenizer.read(with_settings(directory, **changes)) is None


@pytest.mark.parametrize(
    "more",
    [
        {"additional_special_tokens": ["<a new one>"]},
        {"extra_special_tokens": ["<a new one>"]},
        {"extra_special_tokens": {"image_token": "<bos>"}},
    ],
)
def test_more_special_tokens_of_the_older_file_are_added_too(directory, more):
    with_settings(directory, additional_special_tokens=...)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    known = {name: settings[name] for name in NAMED if name in settings}
    (directory / "special_tokens_map.json").write_text(json.dumps(known | {"additional_special_tokens": ["<|user|>"]}))
    assert_same(file_tokenizer.read(directory), in_transformers(directory))
    (directory / "special_tokens_map.json").write_text(json.dumps(known | more))
    assert file_tokenizer.read(directory) is None


def test_line_ends_of_a_template_are_those_of_transformers(directory):
    (directory / "chat_template.jinja").write_bytes(b"{{ bos_token }}\r\n{{ messages[0].content }}\r")
    assert_same(file_tokenizer.read(directory), in_transformers(directory))


@pytest.mark.parametrize("pad_token", ["<pad>", "<a new one>"])
def test_padding_names_the_token_that_the_settings_do_not(directory, pad_token):
    """And adds it; where the settings have one, the file's own does nothing."""
    file = directory / "tokenizer.json"
    state = json.loads(file.read_text())
    state["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
    state["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": pad_token}
    file.write_text(json.dumps(state))
    assert_same(file_tokenizer.read(with_settings(directory, pad_token="<pad>")), in_transformers(directory))
    assert file_tokenizer.read(with_settings(directory, pad_token=...)) is None
    assert load_tokenizer(directory).pad_token == pad_token


@pytest.mark.parametrize("name", ["added_tokens.json", "tekken.json", "special_tokens_map.json"])
def test_files_that_transformers_must_read(directory, name):
    (directory / name).write_text('{"eos_token": "<bos>"}')
    assert file_tokenizer.read(directory) is None


def test_a_long_text_brings_no_line_of_transformers(directory, monkeypatch):
    """Lengths are checked where they matter, with the row's number; this warning names none."""
    loaded = load_tokenizer(with_settings(directory, model_max_length=4, tokenizer_class="Qwen2Tokenizer"))
    assert not isinstance(loaded, file_tokenizer.FileTokenizer)
    from transformers import tokenization_utils_base as theirs

    said = []
    monkeypatch.setattr(theirs.logger, "warning", lambda *words: said.append(words))
    assert len(loaded("one two three four five six seven")["input_ids"]) > 4 and not said


def test_models_whose_tokenizer_transformers_builds_anew(directory):
    from transformers.models.auto import tokenization_auto as theirs

    rebuilt = {
        name
        for name in theirs.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        if theirs.TOKENIZER_MAPPING_NAMES[name] not in {*file_tokenizer.CLASSES, "PythonBackend"}
    }
    assert rebuilt <= set(REBUILT)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    assert file_tokenizer.read(directory) is None


def test_names_that_rendering_takes_are_reserved():
    import inspect

    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    for taken in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        assert set(inspect.signature(taken).parameters) - {"conversations"} <= RESERVED


def test_added_tokens_are_tokens(directory):
    """Also those that the vocabulary does not hold."""
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    number = 1 + max(t["id"] for t in content["added_tokens"] + [{"id": max(content["model"]["vocab"].values())}])
    content["added_tokens"].append({**content["added_tokens"][-1], "id": number, "content": "<|more|>"})
    file.write_text(json.dumps(content))
    light = file_tokenizer.read(directory)
    assert light is not None and len(light) == number + 1 == len(load_tokenizer("bundled")) + 1
    assert light.get_vocab()["<|more|>"] == number


def test_the_template_for_tools_is_for_tools():
    light = file_tokenizer.read(bundled.model_dir())
    assert light is not None
    several = FileTokenizer(Path(), light.backend_tokenizer, {}, {"default": "d", "tool_use": "t", "x": "y"})
    found = [several.get_chat_template(), several.get_chat_template(tools=[{}]), several.get_chat_template("x")]
    assert found == ["d", "t", "y"] and several.get_chat_template("{{ own }}") == "{{ own }}"
    with pytest.raises(ValueError, match="no default chat template"):
        FileTokenizer(Path(), light.backend_tokenizer, {}, {"x": "y"}).get_chat_template()


def test_what_is_not_read_here_comes_from_transformers():
    tokenizer = load_tokenizer("bundled")
    assert tokenizer("a", return_tensors="np")["attention_mask"].tolist() == [[1, 1]]
    assert tokenizer.apply_chat_template(ASKED, return_dict=False) == token_ids(
        tokenizer, tokenizer.apply_chat_template(ASKED, tokenize=False), add_special_tokens=False
    )
    assert tokenizer.model_max_length == 512


def test_no_transformers_is_imported():
    code = (
        "import sys; from ches_jax.data.tokenize import load_tokenizer, PairTokenizer; from ches_jax import bundled\n"
        "from ches_jax.data.sources import open_pairs\n"
        "PairTokenizer(load_tokenizer('bundled'), 512)(list(open_pairs(str(bundled.pairs_file())))[:3])\n"
        "assert not {'transformers', 'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.slow
def test_every_tokenizer_of_the_reference_material(shared):
    directories = {
        (
            p.read_bytes(),
            (p.parent / "tokenizer.json").read_bytes() if (p.parent / "tokenizer.json").exists() else b"",
        ): p
        for p in shared.rglob("tokenizer_config.json")
    }
    read = {p.parent: file_tokenizer.read(p.parent) for p in directories.values()}
    assert sum(light is not None for light in read.values()) > len(read) / 2
    for directory, light in read.items():
        if light is not None:
            assert_same(light, in_transformers(directory))


def test_a_text_that_the_tokenizer_cannot_encode_is_an_error_of_the_data():
    """As where another tokenizer_class is written over a tokenizer.json without its unknown token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert token_ids(tokenizer, "a", add_special_tokens=False) == [0]
    for texts in ("b", ["a", "b"]):
        with pytest.raises(DataError, match=r"cannot encode a text \(Exception: .*look at tokenizer_config.json"):
            token_ids(tokenizer, texts, add_special_tokens=False)
