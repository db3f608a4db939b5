"""The command line as a person meets it: results where they are expected, one message and exit code 2 for bad input."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ches_jax.cli import main
from ches_jax.scores.table import read_table
from tests.report.test_page import page_data

GOOD = {"prompt": "Do you agree?", "chosen": " Yes", "rejected": " No"}


def run(capsys, *words):
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "rejected": " Never"}) + "\n")
    return path


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_score_select_report_and_doctor_work_in_a_row(capsys, tiny_model, pairs, tmp_path):
    code, out, err = run(capsys, "score", "--model", tiny_model, "--pairs", pairs, "--out", tmp_path / "run", "--logps")
    assert (code, out) == (0, f"{tmp_path / 'run'}\n")
    assert "2 pairs, 2 scored" in err and "ln_ches" in err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["counts"]["kept"] == 2 and record["config"]["pairs"] == str(pairs)

    words = ("select", "--scores", tmp_path / "run", "--by", "ches", "--keep", "lowest:1", "--out", tmp_path / "kept")
    assert run(capsys, *words)[:2] == (0, f"{tmp_path / 'kept'}\n")
    kept = [json.loads(line) for line in (tmp_path / "kept" / "pairs.jsonl").read_text().splitlines()]
    assert len(kept) == 1 and kept[0]["prompt"] == GOOD["prompt"]

    code, out, _ = run(capsys, "report", tmp_path / "run")
    assert code == 0 and any(
        "Do you agree?" in text for text in page_data(tmp_path / "run" / "report.html")[2]["prompt"]
    )

    code, out, _ = run(capsys, "doctor", "--model", tiny_model, "--pairs", pairs)
    assert code == 0 and "2 rows, 0 flagged" in out and "Do you agree?" in out


def test_json_goes_to_standard_output_alone(capsys, tiny_model, pairs, tmp_path):
    code, out, _ = run(
        capsys, "score", "--model", tiny_model, "--pairs", pairs, "--out", tmp_path / "r", "--json", "--quiet"
    )
    assert code == 0 and json.loads(out)["counts"]["rows"] == 2
    code, out, _ = run(capsys, "doctor", "--model", tiny_model, "--pairs", pairs, "--json")
    assert json.loads(out)["healthy"] is True


def test_a_huge_prompt_an_empty_and_a_one_token_response_are_flagged_and_the_rest_is_scored(
    capsys, tiny_model, tmp_path
):
    odd = [
        {**GOOD, "prompt": "a " * 30_000},
        {**GOOD, "rejected": ""},
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9, 10, 11]},
    ]
    lines = [json.dumps(row) for row in (GOOD, *odd, {**GOOD, "rejected": " Never"})]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["score", "--model", str(tiny_model), "--pairs", str(tmp_path / "odd.jsonl"), "--batch-tokens", "256"]
    status, out, err = run(capsys, *words, "--out", str(tmp_path / "stopped"))
    assert (status, out) == (2, "")
    assert "2 of 5 rows" in err and "prompt_too_long: 1" in err and "empty_rejected: 1" in err
    assert not (tmp_path / "stopped").exists()

    status, out, _ = run(capsys, *words, "--on-bad-row", "keep", "--logps", "--out", str(tmp_path / "kept"))
    assert (status, out.strip()) == (0, str(tmp_path / "kept"))
    table = read_table(tmp_path / "kept")[0].to_pydict()
    assert table["flags"] == [[], ["prompt_too_long"], ["empty_rejected"], [], []]
    assert table["prompt_tokens"][1] >= 30_000
    assert [value is None for value in table["ches"]] == [False, True, True, False, False]
    assert [value is None for value in table["logp_chosen"]] == [False, True, True, False, False]
    assert table["chosen_tokens"][3] == 2  # the token and EOS


def test_doctor_exits_with_1_when_a_row_is_flagged(capsys, tiny_model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**GOOD, "chosen": GOOD["rejected"]}) + "\n")
    code, out, _ = run(capsys, "doctor", "--model", tiny_model, "--pairs", path)
    assert code == 1 and "identical" in out


def test_columns_are_renamed_by_words(capsys, tiny_model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"ask": "Do you agree?", "yea": " Yes", "nay": " No"}) + "\n")
    words = ("score", "--model", tiny_model, "--pairs", path, "--out", tmp_path / "run", "--quiet")
    assert run(capsys, *words)[0] == 2
    assert run(capsys, *words, "--columns", "prompt=ask", "chosen=yea", "rejected=nay")[0] == 0


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(capsys, tmp_path, model, pairs, pattern, *words):
    """One message that matches, exit code 2, no output directory."""
    code, out, err = run(capsys, "score", "--model", model, "--pairs", pairs, "--out", tmp_path / "out", *words)
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert re.search(pattern, err), err
    assert not (tmp_path / "out").exists()


def rewrite_config(model, **changes):
    path = model / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def rewrite_weights(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def use_index(model, weight_map):
    (model / "model.safetensors").rename(model / "part.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan


def wrong_shape(tensors):
    tensors["model.norm.weight"] = np.ones(5, np.float32)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.extra"] = np.ones(5, np.float32)


BAD_MODELS = {
    "no directory": (lambda m: shutil.rmtree(m), r"no such directory"),
    "no config": (lambda m: (m / "config.json").unlink(), r"no config\.json"),
    "broken config": (lambda m: (m / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), r"no model\.safetensors"),
    "truncated": (truncate, r"model\.safetensors is not a whole safetensors file"),
    "missing shard": (lambda m: use_index(m, {"a": "part.safetensors", "b": "b.safetensors"}), r"'b\.safet.* missing"),
    "outside": (lambda m: use_index(m, {"a": "../../x.safetensors"}), r"path outside the directory"),
    "wrong shape": (lambda m: rewrite_weights(m, wrong_shape), r"3 problems(.|\n)*missing(.|\n)*shape(.|\n)*matches"),
    "NaN": (lambda m: rewrite_weights(m, nan), r"model\.layers\.1\.mlp\.up_proj\.weight' holds NaN"),
    "architecture": (lambda m: rewrite_config(m, model_type="hal"), r"model_type 'hal' is not supported"),
    "rope type": (lambda m: rewrite_config(m, rope_scaling={"rope_type": "spiral"}), r"unknown rope type 'spiral'"),
    "unknown key": (lambda m: rewrite_config(m, residual_multiplier=2.0), r"residual_multiplier"),
    "missing key": (lambda m: rewrite_config(m, hidden_size=...), r"'hidden_size' is missing"),
    "several": (lambda m: rewrite_config(m, hidden_act="cubic", vocab_size="x"), r"2 problems(.|\n)*x(.|\n)*cubic"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), r"tokenizer"),
    "small vocabulary": (lambda m: rewrite_config(m, vocab_size=30), r"vocabulary has 30"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_directory_is_refused(capsys, tmp_path, model, pairs, case):
    damage, pattern = BAD_MODELS[case]
    damage(model)
    refused(capsys, tmp_path, model, pairs, pattern)


BAD_PAIRS = {
    "missing columns": (b'{"prompt": "a", "yes": "b"}\n', r"chosen"),
    "empty file": (b"", r"no rows|empty"),
    "not UTF-8": (json.dumps(GOOD).encode() + b"\n\xff\xfe\n", r"line 2"),
    "broken line": (json.dumps(GOOD).encode() + b'\n{"prompt": \n', r"line 2"),
    "empty prompt": (json.dumps({**GOOD, "prompt": ""}).encode(), r"empty_prompt"),
    "empty response": (json.dumps({**GOOD, "rejected": ""}).encode(), r"empty_rejected"),
    "long prompt": (json.dumps({**GOOD, "prompt": "word " * 3000}).encode(), r"prompt_too_long"),
    "id beyond the vocabulary": (b'{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [9999]}', r"token id 9999"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs_are_refused(capsys, tmp_path, tiny_model, case):
    content, pattern = BAD_PAIRS[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    refused(capsys, tmp_path, tiny_model, path, pattern)


def test_a_tokenizer_without_eos_is_refused_unless_eos_is_excluded(capsys, tmp_path, model, pairs):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    refused(capsys, tmp_path, model, pairs, r"no EOS token.*--eos exclude")


BAD_OPTIONS = {
    "missing pairs": (("--pairs", "nowhere.jsonl"), r"nowhere\.jsonl"),
    "dtype": (("--dtype", "int8"), r"--dtype 'int8'"),
    "mesh": (("--mesh", "data=3,colour=2"), r"expected axis=size"),
    "devices": (("--mesh", "data=64"), r"there are 8"),
    "batch": (("--batch-tokens", "0"), r"--batch-tokens 0"),
    "max length": (("--max-length", "1"), r"--max-length 1"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused(capsys, tmp_path, tiny_model, pairs, case):
    words, pattern = BAD_OPTIONS[case]
    refused(capsys, tmp_path, tiny_model, pairs, pattern, *words)


def test_a_directory_of_something_else_is_left_alone(capsys, tmp_path, tiny_model, pairs):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    code, _, err = run(capsys, "score", "--model", tiny_model, "--pairs", pairs, "--out", tmp_path / "mine")
    assert code == 2 and "holds no run of ours" in err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_the_parser_says_is_one_sentence(capsys):
    code, _, err = run(capsys, "plan", "fly", "--topology", "h100:8")
    assert code == 2 and "--" not in err.replace("--help", "") and "; " not in err
    assert "Expected one of ('score', 'train', 'generate', 'forecast')." in err


def test_verify_hands_over_to_the_theory(capsys):
    code, out, _ = run(capsys, "verify", "--claims", "L1", "--instances", "20")
    assert code == 0 and "1 of 1 claims hold" in out
    assert run(capsys, "verify", "--claims", "no-such-claim")[0] == 2
