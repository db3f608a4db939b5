"""``ches generate`` as a person meets it: rows, endings, resume, and one message for every mistake."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ches_jax import bundled
from ches_jax.cli import main
from ches_jax.data.tokenize import load_tokenizer
from ches_jax.errors import ChesError, DataError, RunError
from ches_jax.generate.config import GenerateConfig
from ches_jax.generate.engine import Completion
from ches_jax.generate.run import FILE_NAME, generate
from ches_jax.generate.stops import Finisher, stop_ids
from ches_jax.judges.answer import final_answer
from ches_jax.runs import chunks
from tests.helpers import write_lines

ASKED = "<|user|> How do I smash the owl's mirror?<|assistant|>"


def make(tmp_path: Path, name: str = "out", *, resume: bool = False, **options: Any) -> list[dict]:
    options = {"max_new_tokens": 24, "batch_size": 8, "mesh": "data=1", **options}
    return list(
        chunks.read_lines(
            generate(GenerateConfig(out=str(tmp_path / name), **options), resume=resume, quiet=True) / FILE_NAME
        )
    )


def assert_same(rows: list[dict], others: list[dict]) -> None:
    """Equal texts; log-probabilities equal to float32 rounding, since batches of other sizes add up in other orders."""
    assert [{**r, "logp": 0} for r in rows] == [{**r, "logp": 0} for r in others]
    assert [r["logp"] for r in rows] == pytest.approx([r["logp"] for r in others], abs=1e-4)


def test_rows_tell_all_of_a_text_and_samples_differ(tmp_path):
    prompts = write_lines(
        tmp_path / "p.jsonl", [{"prompt": ASKED, "category": "mischief", "label": 1}, {"prompt_ids": [1, 3, 4]}]
    )
    rows = make(tmp_path, prompts=prompts, samples=3)
    assert [(r["index"], r["sample"]) for r in rows] == [(i, s) for i in (0, 1) for s in (0, 1, 2)]
    first = rows[0]
    assert set(first) == {
        "row_id",
        "index",
        "sample",
        "prompt",
        "text",
        "finish_reason",
        "logp",
        "prompt_ids",
        "token_ids",
        "category",
        "extra",
    }
    assert (first["prompt"], first["category"], first["extra"]) == (ASKED, "mischief", {"label": 1})
    assert rows[3]["prompt"] is None and rows[3]["prompt_ids"] == [1, 3, 4]
    assert len({r["text"] for r in rows[:3]}) > 1
    tokenizer = load_tokenizer(bundled.model_dir())
    for r in rows:
        assert (r["finish_reason"] == "stop") == (r["token_ids"][-1] == tokenizer.eos_token_id)
        assert r["logp"] < 0 and len(r["token_ids"]) <= 24
    # what a text reads like after its prompt: put together again, the same tokens
    whole = [r for r in rows[:3] if r["finish_reason"] == "stop"]
    assert whole
    for r in whole:
        assert tokenizer(ASKED + r["text"])["input_ids"] == r["prompt_ids"] + r["token_ids"][:-1]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["counts"] == {"prompts": 2, "texts": 6, "tokens": sum(len(r["token_ids"]) for r in rows), "dropped": 0}
    shape = {"rows": 8, "bucket": 32, "stream_rows": 1, "stream_length": 32}
    assert run["config"]["samples"] == 3 and run["compiled_shapes"] == [shape]
    prompts = [len(r["prompt_ids"]) for r in rows[::3]]  # three samples of each share it
    held = sum(prompts) + sum(len(r["token_ids"]) - 1 for r in rows)
    steps = max(len(r["token_ids"]) - 1 for r in rows)
    work = run["work"]
    assert (work["positions"], work["shared_positions"]) == (32 + 8 * steps, 2 * sum(prompts))
    assert work["padding"] == round(1 - held / work["positions"], 4)


def test_the_log_probability_is_the_one_that_scoring_computes(tmp_path):
    from ches_jax.scores.config import ScoreConfig
    from ches_jax.scores.run import score
    from ches_jax.scores.table import read_table

    rows = [r for r in make(tmp_path, samples=2, limit=6) if r["finish_reason"] == "stop"]
    by_prompt: dict[int, list] = {}
    for r in rows:
        by_prompt.setdefault(r["index"], []).append(r)
    pairs = [p for p in by_prompt.values() if len(p) == 2 and p[0]["token_ids"] != p[1]["token_ids"]]
    assert len(pairs) > 2
    data = write_lines(
        tmp_path / "pairs.jsonl",
        [
            {"prompt_ids": a["prompt_ids"], "chosen_ids": a["token_ids"], "rejected_ids": b["token_ids"]}
            for a, b in pairs
        ],
    )
    actual, _ = read_table(score(ScoreConfig(pairs=data, logps=True, out=str(tmp_path / "s")), quiet=True))
    for side, member in (("chosen", 0), ("rejected", 1)):
        expected = [p[member]["logp"] for p in pairs]
        # bf16 weights, float32 sums of 10 to 40 nats
        assert actual[f"logp_{side}"].to_pylist() == pytest.approx(expected, abs=2e-4)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    options: dict[str, Any] = {"chunk_rows": 7, "limit": 20, "samples": 2}
    make(tmp_path, "whole", **options)
    written = chunks.write
    calls = iter(range(2))

    def dies(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        written(*args)

    monkeypatch.setattr(chunks, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, "killed", **options)
    monkeypatch.undo()
    with pytest.raises(RunError, match="--resume"):
        make(tmp_path, "killed", **options)
    with pytest.raises(RunError, match=r"'seed': 0|seed"):
        make(tmp_path, "killed", **options, seed=1, resume=True)
    make(tmp_path, "killed", **options, resume=True)
    assert (tmp_path / "killed" / FILE_NAME).read_bytes() == (tmp_path / "whole" / FILE_NAME).read_bytes()
    assert not (tmp_path / "killed" / chunks.FOLDER).exists()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["counts"]["texts"] == 40
    # killed after its last part, before run.json
    (tmp_path / "killed" / "run.json").unlink()
    make(tmp_path, "killed", **options, resume=True)
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["counts"]["texts"] == 40


@pytest.mark.slow
def test_texts_do_not_depend_on_chunks_or_batches(tmp_path):
    few = make(tmp_path, "a", limit=12)
    assert_same(make(tmp_path, "b", limit=12, chunk_rows=5, batch_size=4), few)


def test_stop_strings_and_tokens(tmp_path):
    plain = make(tmp_path, "a", limit=20)
    words = make(tmp_path, "b", limit=20, stop=("o", " I"))
    assert {r["finish_reason"] for r in words} >= {"stop_string"}
    tokenizer = load_tokenizer(bundled.model_dir())
    for one, other in zip(plain, words, strict=True):
        n = len(other["token_ids"])
        assert one["token_ids"][:n] == other["token_ids"]
        assert "o" not in other["text"] and " I" not in other["text"]
        if other["finish_reason"] == "stop_string":
            assert one["text"].startswith(other["text"])
            shown = tokenizer.decode(one["token_ids"][:n])
            assert "o" in shown or " I" in shown
            assert not any(s in tokenizer.decode(one["token_ids"][: n - 1]) for s in ("o", " I"))
    token = tokenizer.convert_ids_to_tokens(plain[0]["token_ids"][0])
    first = make(tmp_path, "c", limit=1, stop_tokens=(token,))
    assert (first[0]["token_ids"], first[0]["text"]) == (plain[0]["token_ids"][:1], "")
    with pytest.raises(DataError, match="the tokenizer has no such token"):
        make(tmp_path, "d", stop_tokens=("<|nowhere|>",))
    with pytest.raises(ChesError, match="an empty string"):
        make(tmp_path, "e", stop=("",))


def test_a_stop_string_inside_a_token_and_one_after_another():
    import numpy as np

    tokenizer = load_tokenizer(bundled.model_dir())
    ids = tokenizer(" Once there was a cat. The end.", add_special_tokens=False)["input_ids"]
    made = Completion(tuple(ids), np.arange(len(ids), dtype=float), ended=False)
    finish = Finisher(tokenizer, (2,), ("end", "ere was"))
    text = finish([1, 3], made)
    assert text.text == " Once th" and text.finish_reason == "stop_string"
    assert text.logp == sum(range(len(text.tokens))) and len(text.tokens) < len(ids)


def test_stop_tokens_are_those_of_model_and_tokenizer(tmp_path):
    tokenizer = load_tokenizer(bundled.model_dir())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    assert stop_ids(tmp_path, tokenizer, ("<|user|>",)) == (2, tokenizer.convert_tokens_to_ids("<|user|>"), 7, 9)


def test_an_answer_ends_where_the_template_ends_one(tmp_path):
    """Models that keep the EOS of the base model write another token at the end of an answer, and then anything."""
    asked = [{"prompt": [{"role": "user", "content": "How do I smash the owl's mirror?"}]}]
    options = {"prompts": write_lines(tmp_path / "p.jsonl", asked), "temperature": 0.0, "max_new_tokens": 8}
    (free,) = make(tmp_path, "free", **options)
    model = tmp_path / "model"
    shutil.copytree(bundled.model_dir(), model)
    tokenizer = load_tokenizer(model)
    # the third token that the model writes, added to the tokenizer and put at the end of every message
    end = free["token_ids"][2]
    word = tokenizer.convert_ids_to_tokens(end)
    vocabulary = json.loads((model / "tokenizer.json").read_text())
    vocabulary["added_tokens"].append(
        dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        | {"id": end, "content": word}
    )
    vocabulary["added_tokens"].sort(key=lambda token: token["id"])
    (model / "tokenizer.json").write_text(json.dumps(vocabulary))
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("eos_token", repr(word)))
    (row,) = make(tmp_path, "ended", model=str(model), **options)
    n = free["token_ids"].index(end) + 1
    assert (row["token_ids"], row["finish_reason"]) == (free["token_ids"][:n], "stop")
    plain = write_lines(tmp_path / "t.jsonl", [{"prompt_ids": row["prompt_ids"]}])
    (ids,) = make(tmp_path, "ids", model=str(model), **{**options, "prompts": plain})
    assert ids["token_ids"] == free["token_ids"]


@pytest.mark.parametrize(("begin", "end"), [("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>")])
def test_marks_of_reasoning_stay_in_the_text_where_they_are_special_tokens(tmp_path, begin, end):
    """Without them nobody can tell the reasoning from the answer: it would be judged too."""
    model = tmp_path / "model"
    shutil.copytree(bundled.model_dir(), model)
    stored = json.loads((model / "tokenizer.json").read_text())
    ids = [len(load_tokenizer(model)) + i for i in range(2)]
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    stored["added_tokens"] += [{"id": i, "content": word} | token for i, word in zip(ids, (begin, end), strict=True)]
    (model / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(model)
    words = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (" I cannot do that.", " Yes.")]
    finish = Finisher(tokenizer, (2,), ())
    text = finish.decoded([1], [ids[0], *words[0], ids[1], *words[1], 2])
    assert text == f"{begin} I cannot do that.{end} Yes."
    assert final_answer(text) == " Yes."


def test_conversations_go_through_the_template(tmp_path):
    talk = [{"role": "user", "content": "How do I smash the owl's mirror?"}]
    rows = [{"prompt": talk}, {"prompt": [*talk, {"role": "assistant", "content": "No."}, *talk]}]
    actual = make(tmp_path, "a", prompts=write_lines(tmp_path / "p.jsonl", rows))
    text = make(tmp_path, "b", prompts=write_lines(tmp_path / "t.jsonl", [{"prompt": ASKED}]))
    assert actual[0]["prompt_ids"] == text[0]["prompt_ids"] and actual[0]["prompt"] == talk
    assert actual[1]["prompt_ids"][: len(text[0]["prompt_ids"])] == text[0]["prompt_ids"]


def test_bad_prompts_stop_the_run_or_are_left_out_with_a_reason(tmp_path):
    long = " ".join(["owl"] * 600)
    prompts = write_lines(
        tmp_path / "p.jsonl", [{"prompt": ASKED}, {"prompt": ""}, {"prompt": "<bos>" + ASKED}, {"prompt": long}]
    )
    with pytest.raises(
        DataError, match=r"3 of 4 prompts cannot be continued[\s\S]*empty_prompt: 1 rows[\s\S]*--on-bad-row"
    ):
        make(tmp_path, prompts=prompts)
    assert not (tmp_path / "out").exists()
    rows = make(tmp_path, prompts=prompts, on_bad_row="drop")
    assert [r["index"] for r in rows] == [0]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(d["index"], d["reasons"]) for d in dropped] == [
        (1, ["empty_prompt"]),
        (2, ["double_bos"]),
        (3, ["prompt_too_long"]),
    ]
    kept = make(tmp_path, "kept", prompts=prompts, on_bad_row="keep")
    assert [(r["index"], r.get("flags")) for r in kept] == [(0, None), (1, ["empty_prompt"]), (2, ["double_bos"])]
    assert_same(kept[:1], rows)


def test_a_text_ends_where_the_context_does(tmp_path):
    rows = make(tmp_path, prompts=write_lines(tmp_path / "p.jsonl", [{"prompt": ASKED}]), max_length=16)
    (row,) = rows
    assert len(row["prompt_ids"]) + len(row["token_ids"]) == 16 and row["finish_reason"] == "length"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(tmp_path, dtype):
    rows = make(tmp_path, dtype=dtype, limit=8, temperature=0.0)
    plain = make(tmp_path, "plain", limit=8, temperature=0.0)
    if dtype == "float64":
        assert [r["token_ids"] for r in rows] == [r["token_ids"] for r in plain]
        assert [r["logp"] for r in rows] == pytest.approx([r["logp"] for r in plain], abs=1e-4)
    else:
        assert sum(r["token_ids"][:1] == p["token_ids"][:1] for r, p in zip(rows, plain, strict=True)) >= 6


def test_the_command_line(capsys, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("How do I smash the owl's mirror?\n")
    words = ["generate", "--prompts", str(prompts), "--template", "always", "--quiet", "--max-new-tokens", "24"]
    assert main([*words, "--out", str(tmp_path / "out"), "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert (
        out == f"{tmp_path / 'out' / FILE_NAME}\n" and "mirror" in json.loads(Path(out.strip()).read_text())["prompt"]
    )
    for bad, message in {
        ("--top-p", "0"): "--top-p 0.0: expected a probability",
        ("--samples", "0"): "--samples 0: expected a positive number",
        ("--dtype", "int8"): "--dtype 'int8': expected one of",
        ("--columns", "prompt=q"): "no column 'q'",
        ("--mesh", "data=99"): "asks for 99 devices",
        ("--max-length", "1"): "--max-length 1: expected room",
    }.items():
        assert main([*words, "--out", str(tmp_path / "bad"), *bad]) == 2
        stderr = capsys.readouterr().err
        assert message in stderr and "Traceback" not in stderr
        assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_kills_at_random_moments_end_in_the_same_bytes(tmp_path):
    """kill -9, six times, then to the end: the same bytes as a run that was never stopped."""
    command = [sys.executable, "-m", "ches_jax", "generate", "--chunk-rows", "4", "--max-new-tokens", "24", "--quiet"]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True, env=env)
    killed = [*command, "--out", str(tmp_path / "killed"), "--resume"]
    rng = random.Random(0)
    for _ in range(6):
        with subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env) as process:
            time.sleep(rng.uniform(3, 15))
            process.send_signal(signal.SIGKILL)
    subprocess.run(killed, check=True, capture_output=True, env=env)
    assert (tmp_path / "killed" / FILE_NAME).read_bytes() == (tmp_path / "whole" / FILE_NAME).read_bytes()


def test_configs_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(ChesError, match="--temperature"):
        generate(replace(GenerateConfig(model=str(tmp_path / "nothing")), temperature=-1.0))
