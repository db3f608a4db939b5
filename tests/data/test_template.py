"""What is learned from a chat template: how an answer ends and begins; what a row may say to it, and what not."""

import json
import re

import pytest

from ches_jax.data.habits import describe
from ches_jax.data.render import Writer
from ches_jax.data.sources import Record, row_id
from ches_jax.data.template import ChatTemplate
from ches_jax.data.tokenize import PairTokenizer, encode_prompts, load_tokenizer, tokenizer_fingerprint
from ches_jax.errors import DataError

ADDED = ["<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|hdr|>", "<tool>", "</tool>", "<|call|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Q = {"role": "user", "content": "Name a fruit."}


@pytest.fixture(scope="module")
def plain():
    """Bytes and a few added tokens; which of these is called what is up to each test."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)} | {".Ċ": len(letters)}, [(".", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(t, special=t != "<tool>") for t in ADDED])

    def make(template=CHATML, **names):
        options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **names}
        made = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in options.items() if v})
        made.chat_template = template
        return made

    return make


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def one(tokenizer, prompt, chosen, rejected, row=None, **options):
    content = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **(row or {})}
    record = Record(0, row_id(content), "line 1", content)
    (pair,) = PairTokenizer(tokenizer, 512, **options)([record])
    return pair


def said(tokenizer, response):
    """Content as text, and the token that ends it."""
    return tokenizer.decode(response.content), tokenizer.convert_ids_to_tokens(response.terminator)


NAMES = {
    "end of text": {"eos_token": "<|im_end|>"},
    "padding": {"pad_token": "<|im_end|>"},
    "unknown": {"unk_token": "<|im_end|>"},
    "nothing special": {"eos_token": "</s>"},
    "beside no end of text": {"eos_token": None},
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_an_answer_ends_with_what_the_template_writes_behind_it_whatever_it_is_called(plain, names):
    tokenizer = plain(**names)
    pair = one(tokenizer, [Q], [assistant("An apple.")], [assistant("No.")])
    assert said(tokenizer, pair.chosen) == ("An apple.", "<|im_end|>")
    assert said(tokenizer, pair.rejected) == ("No.", "<|im_end|>")
    assert tokenizer.decode(pair.prompt) == "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"
    assert pair.flags == ()


def test_an_added_token_that_is_not_special_ends_an_answer_too(plain):
    tokenizer = plain(CHATML.replace("<|im_end|>", "<tool>"))
    pair = one(tokenizer, [Q], [assistant("a")], [assistant("b")])
    assert (said(tokenizer, pair.chosen), pair.flags) == (("a", "<tool>"), ())


@pytest.mark.parametrize("closing", ["</tool>", "</s>", "<pad>", "\n", " ", ".\n\n"])
def test_nothing_in_an_answer_is_taken_for_its_end(plain, closing):
    tokenizer = plain()
    pair = one(tokenizer, [Q], [assistant("<tool>w()" + closing)], [assistant("No")])
    assert said(tokenizer, pair.chosen) == ("<tool>w()" + closing, "<|im_end|>")
    assert pair.flags == (("double_eos",) if closing == "</s>" else ())


def test_an_end_of_turn_in_the_text_is_content_and_reported(plain):
    tokenizer = plain()
    pair = one(tokenizer, [Q], [assistant("a<|im_end|>")], [assistant("b<|im_end|>c")])
    assert said(tokenizer, pair.chosen) == ("a<|im_end|>", "<|im_end|>")
    assert said(tokenizer, pair.rejected) == ("b<|im_end|>c", "<|im_end|>")
    assert pair.detail == {"double_eos": "chosen ends with 2, 1 inside rejected"}


A_MARK_EACH_TURN = {
    "the beginning (Llama 2)": "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]{% else %} "
    "{{ m.content }} </s>{% endif %}{% endfor %}",
    "two ends (Apriel)": CHATML.replace("<|im_end|>", "<|im_end|></s>"),
    "two ends of a response with a call": "{% for m in messages %}{{ '[' + m.role + ']' + (m.content or '') }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}</s>[assistant]{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "white space": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
}


@pytest.mark.parametrize("template", A_MARK_EACH_TURN.values(), ids=A_MARK_EACH_TURN)
def test_marks_that_the_template_writes_in_a_response_are_no_findings(plain, template):
    tokenizer = plain(template)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    lines = one(tokenizer, [Q], [assistant("a\nb\nc")], [assistant("b"), Q, assistant("c"), Q, assistant("d")])
    called = one(tokenizer, [Q], [call if "tool_calls" in template else assistant("a")], [assistant("b")])
    assert lines.flags == called.flags == ()
    ends, marked = tokenizer.eos_token, one(tokenizer, [Q], [assistant("a</s>b")], [assistant("a<s>")])
    assert marked.detail["double_eos"].startswith("1 inside chosen") and ends == "</s>"
    assert marked.detail["double_bos"] == "1 inside rejected"


def test_a_mark_in_a_thought_or_a_call_of_a_response_is_a_finding(plain):
    template = CHATML.replace("m.content +", "(m.reasoning_content or '') + m.content +")
    pair = one(plain(template), [Q], [assistant("a", reasoning_content="b</s>c")], [assistant("b")])
    assert pair.detail == {"double_eos": "1 inside chosen"}


def test_an_answer_that_the_template_does_not_end_is_flagged(plain):
    """Some write nothing of a message without a text, not even its end."""
    template = CHATML.replace("{{ '<|im_start|>' +", "{% if m.content %}{{ '<|im_start|>' +").replace(
        "\n' }}{% endfor", "\n' }}{% endif %}{% endfor"
    )
    tokenizer = plain(template)
    pair = one(tokenizer, [Q], [assistant("")], [assistant("b")])
    assert pair.chosen.content == () and said(tokenizer, pair.rejected)[1] == "<|im_end|>"
    assert {"empty_chosen", "end_unclear"} <= set(pair.flags)
    assert pair.detail["end_unclear"].startswith(r"the template does not write '<|im_end|>\n' behind chosen")


RESPONSES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'user' %}{{ m.content }}{% elif m.tool_calls %}"
    "<tool>{{ m.tool_calls[0].function | tojson }}</tool>{% else %}<|hdr|>{{ m.content }}<|call|>{% endif %}<|im_end|>"
    "{% endfor %}<|im_start|>assistant"
)


def test_another_header_behind_every_conversation_is_no_header_that_is_never_written(plain):
    """As of Cohere: what opens a response is the model's to write, as where the prompt ends in the header."""
    tokenizer = plain(RESPONSES)
    pair = one(tokenizer, [Q], [assistant("a")], [CALL])
    assert tokenizer.decode(pair.prompt) == "<|im_start|>userName a fruit.<|im_end|><|im_start|>assistant"
    assert said(tokenizer, pair.chosen) == ("<|hdr|>a", "<|call|>")
    called = '<tool>{"name": "find_fig", "arguments": {"x": 1}}</tool>'
    assert (said(tokenizer, pair.rejected), pair.flags) == ((called, "<|im_end|>"), ())
    assert "begins another answer behind every conversation" in describe(ChatTemplate(tokenizer))


ENDS = {
    "always another header": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|hdr|>' + m.content|trim + '<|im_end|>' }}{% endfor %}"
        "{{ '<|im_start|>assistant<|hdr|>' }}",
        ("a", "<|im_end|>"),
    ),
    "white space before it": (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }} </s>{% endif %}"
        "{% endfor %}",
        (" a ", "</s>"),
    ),
    "a line end": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        (" a", "Ċ"),
    ),
    "a line end before another header": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:",
        (" a", "Ċ"),
    ),
    "a line end, and an end of text once": (
        "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% else %}</s>{% endif %}",
        ("a", "Ċ"),
    ),
    "nothing": (
        "{% for m in messages %}{{ '|' + m.role + '|' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}|assistant|{% endif %}",
        ("a", "</s>"),
    ),
    "another token in the middle of a conversation": (
        "{% for m in messages %}{{ '<|im_start|>' + m.content }}"
        "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        ("a", "</s>"),
    ),
}


@pytest.mark.parametrize(("template", "want"), ENDS.values(), ids=ENDS)
def test_templates_end_an_answer_in_their_own_ways(plain, template, want):
    tokenizer = plain(template)
    pair = one(tokenizer, [Q], [assistant("a")], [assistant("b")])
    assert (said(tokenizer, pair.chosen), pair.flags) == (want, ())
    earlier = one(tokenizer, [Q, assistant("z"), Q], [assistant("a")], [assistant("b")])
    assert (said(tokenizer, earlier.chosen), earlier.flags) == (want, ())


def test_an_end_that_is_one_token_with_the_text_before_it_is_reported(plain):
    tokenizer = plain("{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}assistant:")
    pair = one(tokenizer, [Q], [assistant("a.")], [assistant("b")])
    assert said(tokenizer, pair.chosen) == ("a", ".Ċ")
    assert said(tokenizer, pair.rejected) == ("b", "Ċ")
    assert pair.detail == {"end_unclear": "the last letters of chosen and what ends it are one token, '.\\n'"}


def test_a_header_that_is_never_asked_for_belongs_to_the_prompt(plain):
    template = CHATML.partition("{% if add")[0]
    tokenizer = plain(template)
    pair = one(tokenizer, [Q], [assistant("a")], [assistant("b")])
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")
    assert said(tokenizer, pair.chosen) == ("a", "<|im_end|>")
    record = Record(0, "r", "line 1", {"prompt": [Q]})
    assert encode_prompts(Writer.of(tokenizer), [record]) == [(pair.prompt, {})]


THINKING = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
    "{{ '<|im_start|>' + m.role + c + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<think>{% endif %}"
)


def test_a_thought_that_is_opened_when_asking_and_left_out_of_the_answer_is_reported_by_its_name(plain):
    tokenizer = plain(THINKING)
    pair = one(tokenizer, [Q], [assistant("<think>Hm.</think>a")], [assistant("b")])
    assert pair.detail == {
        "prompt_differs": "an answer begins with '<think>' in the prompt and with '' in the conversation",
        "left_out": "the thought of chosen",
    }
    assert tokenizer.decode(pair.prompt) == "<|im_start|>userName a fruit.<|im_end|><|im_start|>assistant"
    assert said(tokenizer, pair.chosen) == ("a", "<|im_end|>")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_beside_the_text_is_missed_whatever_it_is_called(plain, key):
    pair = one(plain(), [Q], [assistant("a", **{key: "Figs are fruits."})], [assistant("b")])
    assert pair.detail == {"left_out": "the thought of chosen"}


SWITCHED = CHATML.replace("m.content +", "m.content.replace('/no_think', '').replace('/think', '').rstrip() +")


@pytest.mark.parametrize("text", ["Be kind. /no_think", "/think", "Be /think kind."])
def test_a_switch_that_the_template_reads_and_takes_out_is_not_missed(plain, text):
    prompt = [{"role": "system", "content": text}, Q]
    assert one(plain(SWITCHED), prompt, [assistant("a")], [assistant("b")]).flags == ()
    deaf = SWITCHED.replace("messages %}", "messages if m.role != 'system' %}")
    flags = one(plain(deaf), prompt, [assistant("a")], [assistant("b")]).flags
    assert flags == (("left_out",) if "kind" in text else ())


def test_how_answers_begin_otherwise_is_said_in_whole_marks(plain):
    template = CHATML.replace("'\n' + m.content", "'\n' + ('</tool>' if m.role == 'assistant' else '') + m.content")
    tokenizer = plain(template.replace("assistant\n' }}{% endif", "assistant\n<tool>' }}{% endif"))
    pair = one(tokenizer, [Q], [assistant("a")], [assistant("b")])
    words = "an answer begins with '<tool>' in the prompt and with '</tool>' in the conversation"
    assert pair.detail == {"prompt_differs": words}


def test_thoughts_of_earlier_answers_are_not_missed(plain):
    tokenizer = plain(THINKING.replace("<think>{%", "{%"))
    prompt = [Q, assistant("<think>Hm.</think>z"), Q]
    assert one(tokenizer, prompt, [assistant("a")], [assistant("b")]).flags == ()


LEFT_OUT = {
    "system": ([{"role": "system", "content": "Be brief."}, Q], {}, "the text of the system"),
    "tools": ([Q], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "the tools"),
}


@pytest.mark.parametrize(("prompt", "row", "reason"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_a_template_leaves_out_is_flagged(plain, prompt, row, reason):
    deaf = CHATML.replace("messages %}", "messages if m.role in ('user', 'assistant') %}")
    pair = one(plain(deaf), prompt, [assistant("a")], [assistant("b")], row)
    assert pair.detail == {"left_out": reason}
    if "tools" not in row:
        record = Record(0, "r", "line 1", {"prompt": prompt})
        assert encode_prompts(Writer.of(plain(deaf)), [record])[0].found == {"left_out": reason}
    heard = CHATML + "{% if tools %}{% endif %}"
    assert one(plain(heard), prompt, [assistant("a")], [assistant("b")], row).flags == ()


CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool>{{ c.function | tojson }}</tool>{% endfor %}END"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "find_fig", "arguments": {"x": 1}}}]}


@pytest.mark.parametrize("end", ["<|im_end|>", "<|call|>"])
def test_calls_of_tools_pass_and_may_end_with_a_token_of_their_own(plain, end):
    tokenizer = plain(CALLS.replace("END", end))
    prompt = [Q, CALL, {"role": "tool", "content": '{"found": "fig"}'}]
    tools = {"tools": [{"function": {"name": "f"}}]}
    pair = one(tokenizer, prompt, [CALL], [assistant("b")], tools)
    assert said(tokenizer, pair.chosen) == ('<tool>{"name": "find_fig", "arguments": {"x": 1}}</tool>', end)
    assert said(tokenizer, pair.rejected) == ("b", "<|im_end|>")
    assert pair.flags == ()
    ignorant = one(plain(), [Q], [{**CALL, "content": ""}], [assistant("b")])
    assert ignorant.detail["left_out"] == "the calls of tools of chosen"


def test_an_answer_that_the_prompt_begins_goes_on(plain):
    tokenizer = plain()
    prompt = [Q, assistant("An ap")]
    pair = one(tokenizer, prompt, [assistant("ple.")], [assistant("ricot.")])
    head = "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\nAn ap"
    assert tokenizer.decode(pair.prompt) == head
    assert said(tokenizer, pair.chosen) == ("ple.", "<|im_end|>")
    assert pair.flags == ()
    record = Record(0, "r", "line 1", {"prompt": prompt})
    assert encode_prompts(Writer.of(tokenizer), [record]) == [(pair.prompt, {})]
    # a template that trims closes the gap in front of what follows, and only there
    trimming = plain(CHATML.replace("m.content", "(m.content | trim)"))
    pair = one(trimming, [Q, assistant("An ")], [assistant("apple.")], [assistant("egg. ")])
    assert trimming.decode(pair.prompt).endswith("assistant\nAn")
    assert (said(trimming, pair.chosen)[0], said(trimming, pair.rejected)[0]) == (" apple.", " egg.")


def test_a_template_that_wants_parts_gets_them(plain):
    parts = "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
    wants = CHATML.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
        f"<|im_start|>{{{{ m.role }}}}\n{parts}<|im_end|>",
    )
    tokenizer = plain(wants)
    pair = one(tokenizer, [Q], [assistant("a")], [assistant("b")])
    assert tokenizer.decode(pair.prompt) == "<|im_start|>user\nName a fruit.<|im_end|><|im_start|>assistant\n"
    prints = one(plain(), [Q], [assistant("a")], [assistant("b")])
    assert said(plain(), prints.chosen) == ("a", "<|im_end|>")


CLOCK = (
    "{% set d = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
    "{{ '<|im_start|>' + d + '<|im_end|>' }}" + CHATML
)


def test_a_clock_is_refused_until_it_is_pinned(plain):
    row = ([Q], [assistant("a")], [assistant("b")])
    with pytest.raises(
        DataError, match=r"writes today's date .* --template-args now=2024-07-26 or date_string=\"26 Jul"
    ):
        one(plain(CLOCK), *row)
    with pytest.raises(DataError, match="today's date"):
        encode_prompts(Writer.of(plain(CLOCK)), [Record(0, "r", "line 1", {"prompt": [Q]})])
    by_name = one(plain(CLOCK), *row, template_args={"date_string": "26 Jul 2024"})
    assert plain().decode(by_name.prompt).startswith("<|im_start|>26 Jul 2024<|im_end|>")
    assert one(plain(CLOCK), *row, template_args={"now": "2024-07-26"}) == by_name
    own = one(plain(CLOCK), *row, {"chat_template_kwargs": {"date_string": "26 Jul 2024"}})
    assert (own.prompt, own.chosen) == (by_name.prompt, by_name.chosen)
    assert one(plain(CLOCK), "a", " b", " c").flags == ()  # plain text meets no template
    guarded = "{% if strftime_now is defined %}" + CLOCK + "{% endif %}"
    assert one(plain(guarded), *row, template_args={"now": "2024-07-26"}).prompt == by_name.prompt


@pytest.mark.parametrize("blank", ["", "\n", "  ", "\n\n  "])
def test_a_stopped_clock_changes_nothing_but_the_date(plain, blank):
    """What stands before the template may not change what its first line means to Jinja."""
    dated = plain(blank + CLOCK)
    today = ChatTemplate(dated, {"date_string": "26 Jul 2024"}).write([Q])
    assert ChatTemplate(dated, {"now": "2024-07-26"}).write([Q]) == today


def test_a_template_that_draws_at_random_is_refused(plain):
    with pytest.raises(DataError, match="draws at random"):
        one(plain(CHATML + "{{ ['a', 'b'] | random }}"), [Q], [assistant("a")], [assistant("b")])


ROW_SAYS = {
    "a template": ({"chat_template": "{{ 'hacked' }}"}, "sets 'chat_template', which is not the row's to say"),
    "how it is rendered": ({"continue_final_message": True}, "sets 'continue_final_message'"),
    "documents": ({"documents": []}, "sets 'documents'"),
    "tokens": ({"tokenize": True}, "sets 'tokenize'"),
    "a special token": ({"bos_token": "x"}, "sets 'bos_token'"),
    "messages": ({"messages": []}, "sets 'messages'"),
    "what the command says otherwise": (
        {"mood": "bad"},
        "'mood' is 'bad' in the row's .* and 'good' in --template-args",
    ),
}


@pytest.mark.parametrize(("row", "reason"), ROW_SAYS.values(), ids=ROW_SAYS)
def test_a_row_sets_variables_of_the_template_and_nothing_else(plain, row, reason):
    tokenizer = plain("{{ mood }}" + CHATML)
    pair = one(
        tokenizer,
        [Q],
        [assistant("a")],
        [assistant("b")],
        {"chat_template_kwargs": row},
        template_args={"mood": "good"},
    )
    assert pair.flags == ("template_refuses",)
    assert re.search(reason, pair.detail["template_refuses"])


def test_variables_reach_the_template_and_those_it_does_not_read_do_nothing(plain):
    tokenizer = plain("{{ mood }}" + CHATML)
    row = {"chat_template_kwargs": {"mood": "bad", "weather": "fine"}}
    assert tokenizer.decode(one(tokenizer, [Q], [assistant("a")], [assistant("b")], row).prompt).startswith("bad<|im")
    of_all = one(tokenizer, [Q], [assistant("a")], [assistant("b")], template_args={"mood": "good"})
    assert tokenizer.decode(of_all.prompt).startswith("good<|im")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"moood": "x"}, "--template-args moood: the chat template reads nothing of this name; did you mean mood"),
        ({"now": "Tuesday"}, "--template-args now=Tuesday: expected a date such as 2024-07-26"),
        ({"chat_template": "x"}, "reads nothing of this name"),
    ],
)
def test_arguments_that_nothing_reads_are_refused(plain, arguments, reason):
    with pytest.raises(DataError, match=reason):
        PairTokenizer(plain("{{ mood }}" + CHATML), 64, template_args=arguments)


def test_a_named_template_or_a_file_can_be_chosen(plain, tmp_path):
    other = CHATML.replace("<|im_end|>", "</s>")
    tokenizer = plain({"default": CHATML, "other": other, "tool_use": "{{ tools | length }}" + CHATML})
    row = ([Q], [assistant("a")], [assistant("b")])
    assert said(tokenizer, one(tokenizer, *row).chosen) == ("a", "<|im_end|>")
    chosen = PairTokenizer(tokenizer, 64, template="other")
    assert said(tokenizer, one(tokenizer, *row, template="other").chosen) == ("a", "</s>")
    assert tokenizer_fingerprint(chosen.tokenizer) != tokenizer_fingerprint(tokenizer)
    tools = {"tools": [{"function": {"name": "f"}}]}
    assert tokenizer.decode(one(tokenizer, *row, tools).prompt).startswith("1<|im_start|>")
    (tmp_path / "mine.jinja").write_text(other)
    assert (
        one(plain(), *row, template=str(tmp_path / "mine.jinja")).chosen
        == one(tokenizer, *row, template="other").chosen
    )
    (tmp_path / "marked.jinja").write_text(other, encoding="utf-8-sig")
    marked = one(plain(), *row, template=str(tmp_path / "marked.jinja"))
    assert marked.prompt == one(tokenizer, *row, template="other").prompt
    with pytest.raises(DataError, match=r"--template othr: no such file, and no template .* did you mean other"):
        one(tokenizer, *row, template="othr")
    with pytest.raises(DataError, match=r"several chat templates: choose one with --template \(a, b\)"):
        one(plain({"a": CHATML, "b": CHATML}), *row)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="the chat template is not Jinja"):
        one(plain(), *row, template=str(tmp_path / "bad.jinja"))


def test_templates_beside_a_tokenizer_are_found_by_name(plain, tmp_path):
    plain({"default": CHATML, "short": "{% for m in messages %}{{ m.content }}</s>{% endfor %}"}).save_pretrained(
        tmp_path
    )
    assert (tmp_path / "additional_chat_templates/short.jinja").exists()
    loaded = load_tokenizer(tmp_path)
    row = ([Q], [assistant("a")], [assistant("b")])
    assert said(loaded, one(loaded, *row).chosen) == ("a", "<|im_end|>")
    assert loaded.decode(list(one(loaded, *row, template="short").prompt)) == "Name a fruit.</s>"


def test_the_template_of_a_processor_is_taken_where_the_tokenizer_has_none(tiny_model, tmp_path):
    """``chat_template.json``, as AutoProcessor reads it; named with --template it is its template and not its text."""
    text = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    assert not load_tokenizer(tmp_path).chat_template
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert load_tokenizer(tmp_path).chat_template == text
    other = load_tokenizer(tiny_model)
    assert Writer.of(other, str(tmp_path / "chat_template.json")).chat.write([Q]) == "[Name a fruit.]"
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(DataError, match=r"chat_template\.json: 'chat_template' is NoneType None; expected one"):
        Writer.of(other, str(tmp_path / "chat_template.json"))
    (tmp_path / "chat_template.jinja").write_text("own")
    assert load_tokenizer(tmp_path).chat_template == "own"


def test_a_template_that_fails_refuses_the_row_in_words(plain):
    for body in ("{{ 1 / 0 }}", "{{ raise_exception('system comes first') }}", "{{ 'a' * 10 ** 12 }}"):
        pair = one(plain(body), [Q], [assistant("a")], [assistant("b")])
        assert pair.flags == ("template_refuses",)
        assert re.match(
            "line 1: .* chat template refuses the row: .*; its roles are user", pair.detail["template_refuses"]
        )


def test_what_is_learned_is_learned_once(plain, monkeypatch):
    tokenizer = plain()
    calls, apply = [], tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda m, **k: calls.append(json.dumps(m)) or apply(m, **k))
    tokenise = PairTokenizer(tokenizer, 512)

    def rows(n):
        content = [{"prompt": [Q], "chosen": [assistant(f"a{i}")], "rejected": [assistant(f"b{i}")]} for i in range(n)]
        return [Record(i, row_id(c), f"line {i + 1}", c) for i, c in enumerate(content)]

    tokenise(rows(1))
    learned = len(calls)
    tokenise(rows(9))
    assert len(calls) - learned == 9 * 3


TOJSON = "{{ c.function.name }}({{ c.function.arguments | tojson }})"
JOINED = "{{ c.function.name + '(' + c.function.arguments + ')' }}"
EITHER = (
    "{{ c.function.name }}({% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
    "{{ c.function.arguments | tojson }}{% endif %})"
)
WITH_TEXT = "{{ m.content + c.function.name }}({{ c.function.arguments | tojson }})"


@pytest.mark.parametrize("arguments", [{"x": "é"}, '{"x": "é"}'], ids=["object", "text"])
@pytest.mark.parametrize("written", [TOJSON, JOINED, EITHER, WITH_TEXT], ids=["tojson", "joined", "either", "text"])
def test_arguments_of_a_call_are_written_once_as_json(plain, written, arguments):
    """Some templates escape text again (what OpenAI's API gives), and some cannot join an object (what TRL wants)."""
    tokenizer = plain(CALLS.replace("END", "<|im_end|>").replace("<tool>{{ c.function | tojson }}</tool>", written))
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "find_fig", "arguments": arguments}}]}
    pair = one(tokenizer, [Q, call, {"role": "tool", "content": "fig"}], [call], [assistant("b")])
    assert pair.flags == ()
    assert said(tokenizer, pair.chosen) == ('find_fig({"x": "é"})', "<|im_end|>")
    assert tokenizer.decode(pair.prompt).count('find_fig({"x": "é"})') == 1


def test_arguments_that_are_no_json_stay_as_they_are(plain):
    tokenizer = plain(CALLS.replace("END", "<|im_end|>").replace("{{ c.function | tojson }}", TOJSON))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "find_fig", "arguments": "x=1"}}]}
    pair = one(tokenizer, [Q], [call], [assistant("b")])
    assert said(tokenizer, pair.chosen)[0] == '<tool>find_fig("x=1")</tool>'


@pytest.mark.parametrize("result", ["sunny & warm", '{"a": "b\\n"}', "晴れ"])
def test_what_a_tool_answered_is_missed_where_the_template_leaves_it_out(plain, result):
    """Templates know the results of tools by one role, and say nothing of messages with another."""
    escaping = CHATML.replace("m.content", "(m.content if m.role != 'tool' else (m.content | tojson))")
    assert (
        one(plain(escaping), [Q, {"role": "tool", "content": result}], [assistant("a")], [assistant("b")]).flags == ()
    )
    deaf = CHATML.replace("messages %}", "messages if m.role != 'function' %}")
    pair = one(plain(deaf), [Q, {"role": "function", "content": result}], [assistant("a")], [assistant("b")])
    assert pair.detail == {"left_out": "the text of the function"}


CLOCKED = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [CHATML, CLOCKED], ids=["plain", "with a clock"])
@pytest.mark.parametrize("behind", ["", "\n"])
def test_a_text_that_a_template_wrote_elsewhere_ends_where_it_does(plain, template, behind):
    """EOS is </s>: the model never writes it behind the end of a turn, nor the line end that the template writes."""
    tokenizer = plain(template)
    prompt = "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"
    pair = one(tokenizer, prompt, f"A fig.<|im_end|>{behind}", "No</s>")
    assert (said(tokenizer, pair.chosen), said(tokenizer, pair.rejected)) == (("A fig.", "<|im_end|>"), ("No", "</s>"))
    assert pair.flags == ()


def test_a_text_that_ends_with_an_unknown_special_token_is_flagged(plain):
    pair = one(plain(template=None), "q", "A fig.<|im_end|>", "<tool>x<tool>")
    assert pair.detail == {"end_unclear": "chosen ends with '<|im_end|>', which is not known to end a response"}
    assert [r.terminator for r in (pair.chosen, pair.rejected)] == [plain().eos_token_id] * 2


def test_white_space_at_the_end_of_a_text_is_its_own_whatever_the_template_ends_with(plain):
    pair = one(plain("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"), "q", "a\n", "b")
    assert said(plain(), pair.chosen) == ("a\n", "</s>")


def test_an_end_that_is_no_token_of_the_tokenizer_is_flagged(plain):
    """A template of another model: its marks fall to pieces, of which the first alone would end the response."""
    foreign = CHATML.replace("<|im_end|>", "<|stop|>")
    pair = one(plain(foreign), [Q], [assistant("a")], [assistant("b")])
    said_of = "the template ends {} with '<|stop|>', which is no token of this tokenizer"
    assert pair.detail == {"end_unclear": ", ".join(said_of.format(side) for side in ("chosen", "rejected"))}
    assert ChatTemplate(plain(foreign)).answer_end() is None
    assert describe(ChatTemplate(plain(foreign))).startswith("ends an answer with '<|stop|>', which is no token")
    for letters in ("#", "", "\n"):  # one token is an end; white space and nothing are too, as before
        known = CHATML.replace("<|im_end|>", letters)
        assert one(plain(known), [Q], [assistant("a")], [assistant("b")]).flags == ()
    assert ChatTemplate(plain()).answer_end() == plain().convert_tokens_to_ids("<|im_end|>")
