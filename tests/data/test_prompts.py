"""Row shapes and chat templates: where the prompt is, and what text the model sees."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ches_jax.data.prompts import canonical_content, canonical_prompt
from ches_jax.data.render import Writer
from ches_jax.data.schema.values import turns
from ches_jax.errors import DataError

CHATML = (
    "{% if tools %}<tools>{{ tools | length }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think %}<think>{% endif %}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHATML, eos_token="a")


@pytest.fixture(scope="module")
def bare():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a")


EXPLICIT = {"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]}
WHOLE = {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}
SAME = {
    "explicit": EXPLICIT,
    "implicit": WHOLE,
    "whole, beside the first user turn as text": {"prompt": "q", **WHOLE},
    "whole, beside the prompt as messages": {"prompt": [user("q")], **WHOLE},
    "whole, beside an empty prompt": {"prompt": "", **WHOLE},
    "text prompt": {**EXPLICIT, "prompt": "q"},
    "text responses": {**EXPLICIT, "chosen": "c", "rejected": "r"},
    "nulls from Arrow": {
        **EXPLICIT,
        "prompt": [{**user("q"), "tool_calls": None}],
        "prompt_ids": None,
        "tools": None,
    },
    "mapping of lists": {
        **EXPLICIT,
        "prompt": {"role": ["user"], "content": ["q"]},
    },
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_all_shapes_of_a_conversation_mean_the_same_pair(row):
    assert canonical_content(row, {}) == EXPLICIT


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_the_prompt_of_a_pair_is_asked_as_it_is_scored(row):
    assert canonical_prompt(row, {}) == {"prompt": EXPLICIT["prompt"]}


def test_several_leading_messages_are_the_prompt():
    head = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    row = {"prompt": "a", "chosen": [*head, assistant("d")], "rejected": [*head, assistant("e")]}
    want = {"prompt": head, "chosen": [assistant("d")], "rejected": [assistant("e")]}
    assert canonical_content(row, {}) == want


def test_the_last_message_is_a_response_even_when_both_are_the_same():
    row = {"chosen": WHOLE["chosen"], "rejected": WHOLE["chosen"]}
    assert canonical_content(row, {})["chosen"] == [assistant("c")]


def test_conversations_without_a_common_beginning_have_an_empty_prompt():
    row = {"chosen": [user("q"), assistant("c")], "rejected": [user("p"), assistant("c")]}
    assert canonical_content(row, {})["prompt"] == []


def test_text_dialogues_are_cut_after_the_last_common_assistant_mark():
    head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": head + " d", "rejected": head + " dd\n\nHuman: e\n\nAssistant: f"}
    content = canonical_content(row, {})
    assert content["prompt"] == head
    assert head + content["rejected"] == row["rejected"]


def test_text_dialogues_without_a_common_mark_have_an_empty_prompt():
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"}
    assert canonical_content(row, {}) == {"prompt": "", **row}


@given(st.text(), st.text(), st.text())
def test_cutting_a_dialogue_loses_nothing(prompt, chosen, rejected):
    head = f"\n\nHuman: {prompt}\n\nAssistant:"
    content = canonical_content({"chosen": head + chosen, "rejected": head + rejected}, {})
    assert content["prompt"] + content["chosen"] == head + chosen
    assert content["prompt"] + content["rejected"] == head + rejected
    assert content["prompt"].startswith(head)


def test_token_ids_win_over_text_and_an_empty_name_hides_a_column():
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    text = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert canonical_content({**ids, **text}, {}) == ids
    assert canonical_content({**ids, **text}, {"chosen_ids": ""}) == text
    assert canonical_content({"prompt": "other", **WHOLE}, {"prompt": ""}) == EXPLICIT


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    row = {**EXPLICIT, "tools": '[{"name": "f"}]', "chat_template_kwargs": {"think": True}}
    text = Writer.of(tokenizer).pair(canonical_content(row, {}))
    want = "<tools>1</tools><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert text.prompt == want + "<think>"
    assert text.chosen == want + "c<|im_end|>\n"


def test_a_conversation_is_written_with_the_template(tokenizer):
    text = Writer.of(tokenizer).pair(EXPLICIT)
    assert text.prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert (text.chosen, text.rejected) == (
        text.prompt + "c<|im_end|>\n",
        text.prompt + "r<|im_end|>\n",
    )
    assert text.templated


PLAIN = {"prompt": "q", "chosen": "c", "rejected": "r"}


def test_plain_text_stays_plain_unless_asked(tokenizer):
    for template in ("auto", "none"):
        text = Writer.of(tokenizer, template).pair(PLAIN)
        assert (text.prompt, text.chosen, text.rejected, text.templated) == ("q", "qc", "qr", False)
    assert Writer.of(tokenizer, "always").pair(PLAIN) == Writer.of(tokenizer).pair(EXPLICIT)


def test_no_template_reads_single_turns_as_text(tokenizer, bare):
    assert Writer.of(bare, "none").pair(EXPLICIT) == Writer.of(tokenizer).pair(PLAIN)
    longer = {**EXPLICIT, "prompt": [user("a"), assistant("b"), user("q")]}
    with pytest.raises(DataError, match="several messages, which --template none cannot"):
        Writer.of(bare, "none").pair(longer)


def test_a_conversation_needs_a_template(bare):
    with pytest.raises(DataError, match="the tokenizer has no chat template: use a tokenizer with"):
        Writer.of(bare, "auto").pair(EXPLICIT)


def test_what_the_template_says_is_reported(tokenizer, monkeypatch):
    refuses = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tokenizer, "chat_template", refuses)
    with pytest.raises(DataError, match="refuses the row: roles must alternate; its roles are user"):
        Writer.of(tokenizer).pair(EXPLICIT)


def test_empty_parts_are_named(tokenizer):
    assert Writer.of(tokenizer).pair({**PLAIN, "prompt": ""}).empty == ("prompt",)
    empty = {"prompt": [], "chosen": [assistant("")], "rejected": [assistant("r")]}
    assert Writer.of(tokenizer).pair(empty).empty == ("prompt", "chosen")
    blank = {"prompt": [user("\t")], "chosen": [assistant("c")], "rejected": [assistant(" \n")]}
    assert Writer.of(tokenizer).pair(blank).blank == ("prompt", "rejected")
    calls = [{"role": "assistant", "content": " ", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    assert Writer.of(tokenizer).pair({**blank, "chosen": calls}).blank == ("prompt", "rejected")


@pytest.mark.parametrize("role", ["user", "system", "developer", "tool", "ipython"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_response_ends_with_an_answer_of_the_assistant(role, side):
    """With another message at its end a response would hold what the model never says, up to an end that is not its."""
    other = {"role": role, "content": "x"}
    for row in (EXPLICIT, WHOLE):
        with pytest.raises(DataError, match=f"'{side}' ends with a message of the {role}"):
            canonical_content({**row, side: [*row[side], other]}, {})
    later = [*EXPLICIT[side], other, assistant("z")]
    assert canonical_content({**EXPLICIT, side: later}, {})[side] == later


@pytest.mark.parametrize(
    "row", [{"chosen": []}, {"prompt": None, "chosen": [user("q"), assistant("c")], "rejected": []}]
)
def test_an_empty_list_of_messages_is_no_response(row):
    with pytest.raises(DataError, match="is an empty list; expected a response"):
        canonical_content({**EXPLICIT, **row}, {})


def test_a_message_without_content_is_named():
    with pytest.raises(DataError, match=r"'chosen', message 0 \(of the assistant\) has no content"):
        canonical_content({**EXPLICIT, "chosen": [{"role": "assistant", "content": None}]}, {})


FUNCTION = {"name": "w", "arguments": '{"x": 1}'}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": FUNCTION}]}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "function_call": FUNCTION},
        {"role": "assistant", "content": None, "tool_calls": json.dumps(CALL["tool_calls"])},
        {"role": "assistant", "content": None, "tool_calls": f" {json.dumps(CALL['tool_calls'])}\n"},
        {"role": "assistant", "content": None, "tool_calls": CALL["tool_calls"], "function_call": None},
        {"from": "function_call", "value": json.dumps(FUNCTION)},
        {"from": "function_call", "value": json.dumps([FUNCTION])},
    ],
)
def test_calls_of_tools_are_read_in_every_shape(message):
    row = {**EXPLICIT, "chosen": [turns(message)]}
    assert canonical_content(row, {})["chosen"] == [CALL]


def test_tools_that_are_listed_as_text_are_objects():
    tool = {"type": "function", "function": {"name": "w"}}
    for tools in ([json.dumps(tool)], json.dumps([tool]), [tool]):
        assert canonical_content({**EXPLICIT, "tools": tools}, {})["tools"] == [tool]
    for none in ("w", 7, None):
        with pytest.raises(DataError, match=r"'tools' lists .*; expected objects, or their JSON text"):
            canonical_content({**EXPLICIT, "tools": [tool, none]}, {})


def test_nulls_of_tools_are_kept_where_somebody_wrote_them():
    """A tool's schema says "default": null, in text; in a table an object has a null for each field that it lacks."""
    tool = {"name": "f", "parameters": {"x": {"default": None}}}
    kept = [canonical_content({**EXPLICIT, "tools": t}, {})["tools"] for t in (json.dumps([tool]), [json.dumps(tool)])]
    assert kept == [[tool], [tool]]
    assert canonical_content({**EXPLICIT, "tools": [tool]}, {})["tools"] == [{"name": "f", "parameters": {"x": {}}}]


def test_calls_of_tools_that_are_none_are_refused():
    with pytest.raises(DataError, match="'chosen', message 0: its calls of tools are str 'w'"):
        canonical_content({**EXPLICIT, "chosen": [{"role": "assistant", "tool_calls": "w"}]}, {})
    deep = f'[{{"function": {{"name": "w", "arguments": {"[" * 900}{"]" * 900}}}}}]'
    with pytest.raises(DataError, match="expected a list of objects with a 'function'"):
        canonical_content({**EXPLICIT, "chosen": [{"role": "assistant", "tool_calls": deep}]}, {})
    text = {"role": "function_call", "content": "look it up"}
    assert turns(text) == text


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "value"), ("role", "text"), ("role", "content")])
def test_a_turn_under_other_keys_is_a_message(keys):
    speaker, said = keys
    assert turns({speaker: "prompter", said: "q"}) == user("q")
    assert turns({speaker: "observation", said: "q"}) == {"role": "tool", "content": "q"}


@pytest.mark.parametrize(
    ("part", "way"),
    [("tool_use", "'tool_calls' of the message"), ("tool_result", "role 'tool'"), ("thinking", "'reasoning_content'")],
)
def test_parts_of_other_apis_are_refused_with_where_they_belong(part, way):
    content = [{"type": "text", "text": "a"}, {"type": part}]
    with pytest.raises(DataError, match=f"a part of type '{part}', and only text can be read: .*{way}"):
        canonical_content({**EXPLICIT, "chosen": [{"role": "assistant", "content": content}]}, {})


@pytest.mark.parametrize("between", ["\r\n\r\n", "\n", "\r\n"])
def test_text_dialogues_with_other_line_ends_are_cut_too(between):
    head = f"{between}Human: a{between}Assistant: b{between}Human: c{between}Assistant:"
    row = {"chosen": head + " d", "rejected": head + " e"}
    assert canonical_content(row, {}) == {"prompt": head, "chosen": " d", "rejected": " e"}
    # one line end is a mark only where no empty line is
    mixed = "\n\nHuman: a\n\nAssistant: he wrote\nAssistant: "
    assert (
        canonical_content({"chosen": mixed + "d", "rejected": mixed + "e"}, {})["chosen"] == " he wrote\nAssistant: d"
    )
