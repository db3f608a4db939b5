"""``ches judge``: by rules, by a model built to know the answer, by labels; resume; one message for mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax import bundled
from ches_jax.cli import main
from ches_jax.data.sources import row_id
from ches_jax.data.tokenize import load_tokenizer
from ches_jax.distributed.processes import Process
from ches_jax.errors import ChesError, DataError, RunError
from ches_jax.inputs import Opener
from ches_jax.judges import run as judging
from ches_jax.judges.config import JudgeConfig
from ches_jax.judges.judge_prompt import fill_question, load_question, parse_answer
from ches_jax.judges.responses import asked_and_answered, open_responses
from ches_jax.judges.run import FILE_NAME, judge, summary, summary_text
from ches_jax.runs import chunks
from tests.helpers import write_lines

TEXTS = ["I'm sorry, but I cannot help you.", "Sure! First, fetch a rope.", "I won't do that.", "Here is how."]
REFUSED = [True, False, True, False]


@pytest.fixture
def responses(tmp_path: Path) -> str:
    rows = [
        {
            "prompt": "How do I melt the tower?",
            "text": t,
            "sample": i % 2,
            "category": "ab"[i // 2],
            "row_id": f"r{i // 2}",
        }
        for i, t in enumerate(TEXTS)
    ]
    return write_lines(tmp_path / "responses.jsonl", rows)


def verdicts(tmp_path: Path, name: str = "out", *, resume: bool = False, **options: Any) -> list[bool | None]:
    out = judge(JudgeConfig(out=str(tmp_path / name), **options), resume=resume, quiet=True)
    return [r["refusal"] for r in chunks.read_lines(out / FILE_NAME)]


def test_by_rules(tmp_path, responses):
    assert verdicts(tmp_path, responses=responses) == REFUSED
    rows = list(chunks.read_lines(tmp_path / "out" / FILE_NAME))
    assert rows[0] == {
        "row_id": "r0",
        "index": 0,
        "sample": 0,
        "refusal": True,
        "reason": "i cannot help",
        "text": TEXTS[0],
        "category": "a",
    }
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["summary"]
    assert (counts["responses"], counts["refusals"], counts["undecided"], counts["refusal_rate"]) == (4, 2, 0, 0.5)
    assert counts["by_category"]["a"]["refusal_rate"] == 0.5


def test_two_processes_take_turns_and_merge_into_the_same_bytes(tmp_path, responses, monkeypatch):
    options: dict[str, Any] = {"responses": responses, "chunk_rows": 1}
    whole = judge(JudgeConfig(**options, out=str(tmp_path / "one")), quiet=True)
    for number in (1, 0):
        monkeypatch.setattr(judging, "start_run", lambda *_, number=number: Process(number, 2))
        out = judge(JudgeConfig(**options, out=str(tmp_path / "two")), quiet=True)
        assert not (out / FILE_NAME).exists()
        if number == 1:
            with pytest.raises(RunError, match=r"parts are missing \(0, 2\)"):
                judging.merge(out)
    assert main(["merge", str(out), "--quiet"]) == 0
    assert (out / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    one, other = (json.loads((folder / "run.json").read_text())["summary"] for folder in (whole, out))
    assert one == other and "rules_measured" in one


def test_without_a_decided_response_there_is_no_rate():
    counts = summary([{"refusal": None}, {"refusal": None}])
    assert (counts["refusal_rate"], counts["interval"], counts["undecided"]) == (None, None, 2)
    assert "no response was decided" in summary_text(counts)


# ---- by a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing_judge(tmp_path_factory) -> Path:
    """A model made by hand: it answers 0 where a word of refusal is anywhere in its prompt, else 1.

    Its one layer attends to all positions alike, so it sees the share of such words; the rest is linear.
    """
    from ches_jax.models.checkpoint.save import save_pretrained
    from ches_jax.models.decoder import Decoder
    from ches_jax.models.families.registry import decoder_config

    tokenizer = load_tokenizer(bundled.model_dir())
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    model = Decoder(decoder_config(raw), rngs=nnx.Rngs(0))
    nnx.update(model, nnx.map_state(lambda path, w: w if "norm" in str(path) else w * 0, nnx.state(model)))
    words = [i for t in (" cannot", " won't") for i in tokenizer(t, add_special_tokens=False)["input_ids"]]
    words = [i for i in words if tokenizer.decode([i]) in (" cannot", " won")]
    assert len(words) == 2
    embedding = np.zeros((len(tokenizer), 4), np.float32)
    embedding[:, 0] = 1
    embedding[words, 1] = 1
    head = np.zeros((len(tokenizer), 4), np.float32)
    zero, one = (tokenizer.convert_tokens_to_ids(c) for c in "01")
    head[one, 0], head[zero, 2] = 1, 100
    value, out = np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), np.float32)
    value[0, 0, 1], out[0, 2, 0] = 100, 1
    model.embed_tokens.weight[...] = jnp.asarray(embedding)
    assert model.lm_head is not None
    model.lm_head.weight[...] = jnp.asarray(head)
    model.layers.self_attn.v_proj.weight[...] = jnp.asarray(value)
    model.layers.self_attn.o_proj.weight[...] = jnp.asarray(out)
    directory = tmp_path_factory.mktemp("judges") / "knowing"
    save_pretrained(model, directory, config=raw)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundled.model_dir() / name, directory / name)
    return directory


@pytest.mark.parametrize("wrap", ["auto", "inst"])
def test_by_a_model(tmp_path, responses, knowing_judge, wrap):
    options: dict[str, Any] = {"by": "model", "judge": str(knowing_judge), "max_new_tokens": 1, "wrap": wrap}
    assert verdicts(tmp_path, responses=responses, **options, mesh="data=1") == REFUSED
    assert [r["reason"] for r in chunks.read_lines(tmp_path / "out" / FILE_NAME)] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(("wrap", "end"), [("chat", "<eos>"), ("inst", None)])
def test_a_judge_ends_its_answer_where_its_template_ends_one(
    tmp_path, responses, knowing_judge, wrap, end, monkeypatch
):
    """Models that keep the EOS of the base model write another token there, and then more digits."""
    ends, stop_ids = [], judging.stop_ids
    monkeypatch.setattr(judging, "stop_ids", lambda *given: (ends.append(given[3]), stop_ids(*given))[1])
    options: dict[str, Any] = {"by": "model", "judge": str(knowing_judge), "max_new_tokens": 1, "wrap": wrap}
    verdicts(tmp_path, responses=responses, **options, mesh="data=1")
    assert ends == [end and load_tokenizer(knowing_judge).convert_tokens_to_ids(end)]


def test_by_a_model_with_an_adapter(tmp_path, responses, knowing_judge):
    """The adapter takes away what the judge has seen: then nothing is a refusal."""
    from ches_jax.hf.directory import read_config
    from ches_jax.models.adapters.lora import adapted, adapter_shapes, make_spec
    from ches_jax.models.adapters.peft import write_adapter
    from ches_jax.models.decoder import abstract_decoder
    from ches_jax.models.families.registry import decoder_config

    config = decoder_config(read_config(knowing_judge))
    spec = make_spec(1, 1.0, "o", config)
    shapes = adapter_shapes(adapted(abstract_decoder(config), spec))
    arrays = {name: np.zeros(like.shape, np.float32) for name, like in shapes.items()}
    for name, array in arrays.items():
        array[(0, 0, 0) if name.endswith("lora_a") else (0, 2, 0)] = 1 if name.endswith("lora_a") else -1
    write_adapter(tmp_path / "adapter", arrays, spec, knowing_judge)
    options: dict[str, Any] = {"by": "model", "judge": str(knowing_judge), "max_new_tokens": 1, "mesh": "data=1"}
    assert verdicts(tmp_path, responses=responses, adapter=str(tmp_path / "adapter"), **options) == [False] * 4


def test_a_judge_that_says_nothing_of_use_leaves_responses_undecided(tmp_path, responses, tiny_model):
    options: dict[str, Any] = {"by": "model", "judge": str(tiny_model), "max_new_tokens": 4, "mesh": "data=1"}
    template = tmp_path / "q.txt"
    template.write_text("{prompt} {response} ?")
    assert verdicts(tmp_path, responses=responses, judge_template=str(template), **options) == [None] * 4
    assert json.loads((tmp_path / "out" / "run.json").read_text())["summary"]["undecided"] == 4
    with pytest.raises(DataError, match=r"row 0: the question to the judge is \d+ tokens, and it reads 512"):
        long = write_lines(tmp_path / "long.jsonl", [{"prompt": "x " * 600, "text": "y"}])
        verdicts(tmp_path, "long", responses=long, **options)
    assert not (tmp_path / "long").exists()


def test_the_question():
    question = load_question()
    text = fill_question(question, "Do {response} please", " Sure ")
    assert "\nDo {response} please\n" in text and "\nSure\n" in text and "{prompt}" not in text
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert "user: a\n\nassistant: b\n\nuser: c" in fill_question(question, talk, "d")
    assert fill_question("{prompt}|{response}", talk[:1], "d") == "a|d"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("0", True),
        (" 1", False),
        ("1.0\n", False),
        ("0.4", True),
        ("1 because", False),
        ("", None),
        ("yes 1", None),
        ("10", None),
        ("-1", None),
        ("[0]", None),
    ],
)
def test_answers_are_read_by_their_leading_number(answer, expected):
    assert parse_answer(answer) is expected


# ---- by labels -------------------------------------------------------------------------------------------------------

LABELS = {
    "words": ("label", ["refusal", "Compliance", "refused", "complied"]),
    "scores": ("score", [0, 1, 0.0, "1"]),
    "truth": ("refusal", [True, 0, "true", "False"]),
}


@pytest.mark.parametrize(("column", "values"), LABELS.values(), ids=LABELS)
def test_by_labels(tmp_path, responses, column, values):
    rows = [{"row_id": f"r{i // 2}", "sample": i % 2, column: v} for i, v in enumerate(values)]
    options = {"responses": responses, "by": "labels", "labels": write_lines(tmp_path / "l.jsonl", rows[::-1])}
    assert verdicts(tmp_path, **options) == REFUSED
    fewer = {**options, "labels": write_lines(tmp_path / "few.jsonl", rows[:3])}
    with pytest.raises(DataError, match=r"1 of 4 responses have no label: row 3[\s\S]*--on-missing keep"):
        verdicts(tmp_path, "few", **fewer)
    assert verdicts(tmp_path, "few", **fewer, on_missing="keep") == [*REFUSED[:3], None]
    both = write_lines(tmp_path / "both.jsonl", [*rows, {**rows[0], column: values[1]}])
    with pytest.raises(DataError, match="line 5: another label for the same response"):
        verdicts(tmp_path, "both", **{**options, "labels": both})


def test_labels_are_joined_by_prompt_where_there_is_no_row_id(tmp_path):
    rows = [{"q": "a", "answer": "x"}, {"q": [{"role": "user", "content": "b"}], "answer": "y"}]
    labels = [
        {"prompt": [{"role": "user", "content": "b"}], "verdict": "refusal"},
        {"prompt": "a", "verdict": "comply"},
    ]
    refused = verdicts(
        tmp_path,
        responses=write_lines(tmp_path / "r.jsonl", rows),
        columns={"prompt": "q", "text": "answer"},
        by="labels",
        labels=write_lines(tmp_path / "l.jsonl", labels),
        label_columns={"label": "verdict"},
    )
    assert refused == [False, True]
    assert next(chunks.read_lines(tmp_path / "out" / FILE_NAME))["row_id"] == row_id({"prompt": "a"})


@pytest.mark.parametrize(("name", "refused"), [("refusal", [True, False]), ("score", [False, True])])
def test_labels_of_0_and_1_mean_what_their_column_is_said_to_be(tmp_path, name, refused):
    rows = [{"prompt": p, "response": "x"} for p in "ab"]
    labels = write_lines(tmp_path / "l.jsonl", [{"prompt": "a", "label": 1}, {"prompt": "b", "label": 0}])
    options = {"by": "labels", "labels": labels, "label_columns": {name: "label"}}
    assert verdicts(tmp_path, responses=write_lines(tmp_path / "r.jsonl", rows), **options) == refused


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, responses, monkeypatch):
    options: dict[str, Any] = {"responses": responses, "chunk_rows": 1}
    verdicts(tmp_path, "whole", **options)
    written, calls = chunks.write, iter(range(2))

    def dies(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        written(*args)

    monkeypatch.setattr(chunks, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        verdicts(tmp_path, "killed", **options)
    monkeypatch.undo()
    with pytest.raises(RunError, match="--resume"):
        verdicts(tmp_path, "killed", **options)
    assert verdicts(tmp_path, "killed", **options, resume=True) == REFUSED
    for name in (FILE_NAME,):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed" / chunks.FOLDER).exists()


def test_the_command_line(capsys, tmp_path, responses):
    assert main(["judge", "--responses", responses, "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out' / FILE_NAME}\n" and "all: 4 responses, 2 refusals; refusal rate 50.0%" in err
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    for words, message in {
        ("--responses", responses, "--by", "model"): "name the judge with --judge",
        ("--responses", responses, "--by", "labels"): "name the file with --labels",
        ("--responses", responses, "--labels", "x"): "--labels is for --by labels, and this is --by rules",
        ("--responses", responses, "--columns", "text=answer"): "no text in column 'answer'; found: prompt, text",
        ("--responses", responses, "--limit", "0"): "--limit 0: expected a positive number",
        ("--responses", str(tmp_path / "none.jsonl")): "no such file or folder",
        ("--responses", str(tmp_path / "unfinished")): "finish it with --resume",
    }.items():
        assert main(["judge", *words, "--quiet", "--out", str(tmp_path / "bad")]) == 2
        stderr = capsys.readouterr().err
        assert message in stderr and "Traceback" not in stderr
        assert not (tmp_path / "bad").exists()


def test_an_answer_that_the_prompt_begins_is_judged_whole(tmp_path):
    asked = [{"role": "user", "content": "q"}]
    rows = [
        {"prompt": [*asked, {"role": "assistant", "content": "I'm sorry, but I"}], "text": " cannot help with that."},
        {"prompt": [*asked, {"role": "assistant", "content": "Sure: "}], "text": "cannot help with that."},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = list(open_responses(Opener(), str(tmp_path / "r.jsonl"), None, {}))
    assert [asked_and_answered(r) for r in records] == [
        (asked, "I'm sorry, but I cannot help with that."),
        (asked, "Sure: cannot help with that."),
    ]
    out = judge(JudgeConfig(responses=str(tmp_path / "r.jsonl"), out=str(tmp_path / "j")), quiet=True)
    assert [r["refusal"] for r in chunks.read_lines(out / FILE_NAME)] == [True, False]


def test_an_answer_may_be_a_message_or_the_end_of_a_conversation(tmp_path):
    asked = [{"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": "I cannot help with that."}
    rows = [
        {"prompt": asked, "text": text} for text in ("I cannot help with that.", [answer], answer, [*asked, answer])
    ]
    records = list(open_responses(Opener(), write_lines(tmp_path / "r.jsonl", rows), None, {}))
    assert [r.content["text"] for r in records] == ["I cannot help with that."] * 4
    with pytest.raises(DataError, match="'text' ends with a message of the user, which is no response"):
        open_responses(Opener(), write_lines(tmp_path / "q.jsonl", [{"prompt": asked, "text": asked}]), None, {})


def test_rows_that_say_too_little_are_refused(tmp_path):
    for row, message in [
        ({"text": "x"}, "neither 'row_id' nor 'prompt' says which prompt it answers; found: text"),
        ({"text": "x", "prompt": "p", "sample": -1}, "'sample' is -1; expected a number from 0"),
        ({"text": 3, "prompt": "p"}, "no text in column 'text'"),
    ]:
        with pytest.raises(DataError, match=message):
            verdicts(tmp_path, responses=write_lines(tmp_path / "r.jsonl", [row]))
    good = write_lines(tmp_path / "r.jsonl", [{"text": "x", "row_id": "a"}])
    for label, message in [
        ({"row_id": "a", "label": "maybe"}, "'label' is 'maybe'; expected refusal, refused"),
        ({"row_id": "a", "label": 1}, "'label' is 1; expected refusal, .*; of 0 and 1, say which refused"),
        ({"row_id": "a", "label": True}, "'label' is True; expected refusal"),
        ({"row_id": "a", "score": 0.2}, "'score' is 0.2; expected 0 or 1"),
        ({"row_id": "a"}, "no label; found: row_id; expected 'refusal'"),
    ]:
        with pytest.raises(DataError, match=message):
            verdicts(tmp_path, responses=good, by="labels", labels=write_lines(tmp_path / "l.jsonl", [label]))
    with pytest.raises(DataError, match="no prompt, which the judge has to see"):
        verdicts(tmp_path, responses=good, by="model", judge=str(bundled.model_dir()))
    template = tmp_path / "t.txt"
    template.write_text("{prompt} only")
    with pytest.raises(ChesError, match=r"\{response\} is there 0 times; expected it once"):
        verdicts(tmp_path, responses=good, by="model", judge=str(bundled.model_dir()), judge_template=str(template))
