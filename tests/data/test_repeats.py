"""A prompt that the responses repeat counts once; what cannot be separated is flagged."""

import pytest

from ches_jax.data.prompts import canonical_content
from ches_jax.data.repeats import doubts
from ches_jax.errors import DataError

LONG = "Human: name a fruit that is red.\nAssistant:"


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def read(prompt, chosen, rejected):
    content = canonical_content({"prompt": prompt, "chosen": chosen, "rejected": rejected}, {})
    return content["prompt"], content["chosen"], content["rejected"], doubts(content)


@pytest.mark.parametrize(
    ("prompt", "head", "left"),
    [
        (LONG, LONG, LONG),
        (LONG + "  ", LONG, LONG),
        (LONG, LONG.replace("\n", "\r\n"), LONG.replace("\n", "\r\n")),
        (LONG.replace("\n", "\r\n"), LONG, LONG),
        (LONG.replace("\n", "  \n"), LONG, LONG),
        ("\n\n" + LONG, LONG, LONG),
        (LONG, "\n\n" + LONG, "\n\n" + LONG),
        ("word " * 10, "word " * 10, "word " * 10),
    ],
)
def test_a_text_that_both_responses_begin_with_is_the_prompt_once(prompt, head, left):
    tail = " An apple." if head[-1] != " " else "An apple."
    reading = read(prompt, head + tail, head + tail.replace("An apple", "No"))
    assert reading == (left, tail, tail.replace("An apple", "No"), {})


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (LONG + " An apple.", "No.", "chosen begins with the prompt"),
        ("An apple.", LONG.replace("\n", "\r\n") + " No.", "rejected begins with the prompt"),
        ("An apple.", "No.", None),
        (LONG[:20], LONG[:20], None),
    ],
)
def test_a_prompt_that_one_response_repeats_is_flagged_and_stays(chosen, rejected, reason):
    assert read(LONG, chosen, rejected) == (LONG, chosen, rejected, {"prompt_repeated": reason} if reason else {})


def test_each_response_is_cut_where_its_own_repetition_ends():
    assert read(LONG, LONG + " An apple.", "\n\n" + LONG + " No.") == (LONG, " An apple.", " No.", {})


def test_short_texts_begin_answers_by_chance():
    """A greeting is answered with itself; a short question in both answers is flagged, and nothing is taken away."""
    assert read("Hello", "Hello! How can I help?", "Hello.") == ("Hello", "Hello! How can I help?", "Hello.", {})
    *texts, flags = read("Who are you?", "Who are you? Bob.", "Who are you? Al.")
    assert texts == ["Who are you?", "Who are you? Bob.", "Who are you? Al."]
    assert flags == {"prompt_repeated": "chosen and rejected begin with the prompt"}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "left", "reason"),
    [
        ([5, 6, 7, 8], [5, 6, 7, 8, 1], [5, 6, 7, 8, 2], ([5, 6, 7, 8], [1], [2]), None),
        ([0, 6, 7, 8], [6, 7, 8, 1], [6, 7, 8, 2], None, "chosen and rejected begin with the prompt"),
        ([5, 6, 7, 8], [1], [5, 6, 7, 8, 2], None, "rejected begins with the prompt"),
        ([5, 6, 7, 8], [5, 6, 7, 8, 1], [2], None, "chosen begins with the prompt"),
        ([5], [5, 1], [5, 2], None, None),
    ],
)
def test_token_ids(prompt, chosen, rejected, left, reason):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    content = canonical_content(dict(zip(names, (prompt, chosen, rejected), strict=True)), {})
    assert tuple(content.values()) == (left or (prompt, chosen, rejected))
    assert doubts(content) == ({"prompt_repeated": reason} if reason else {})


BRIEF, Q, C, R = system("Be brief."), user("q"), assistant("c"), assistant("r")
MEANS = {
    "system in the responses only": ([Q], [BRIEF, Q, C], [BRIEF, Q, R], ([BRIEF, Q], [C], [R])),
    "system in the prompt only": ([BRIEF, Q], [Q, C], [Q, R], ([BRIEF, Q], [C], [R])),
    "the same system": ([BRIEF, Q], [BRIEF, Q, C], [BRIEF, Q, R], ([BRIEF, Q], [C], [R])),
    "other keys": ([Q], [user("q", id=1), C], [user("q", tokens=3), R], ([Q], [C], [R])),
    "line ends": ([user("a\nb ")], [user("a\r\nb"), C], [user("a\nb"), R], ([user("a\nb ")], [C], [R])),
    "the last turn is in the prompt": (
        [user("2")],
        [Q, C, user("2"), C],
        [Q, C, user("2"), R],
        ([Q, C, user("2")], [C], [R]),
    ),
    "the last turn is in the responses": (
        [Q, C, user("2")],
        [user("2"), C],
        [user("2"), R],
        ([Q, C, user("2")], [C], [R]),
    ),
    "the prompt as a text": ("q", [BRIEF, Q, C], [BRIEF, Q, R], ([BRIEF, Q], [C], [R])),
    "other keys and no prompt": (None, [user("q", id=1), C], [user("q", id=2), R], ([user("q", id=1)], [C], [R])),
    "one object each": ([Q], C, R, ([Q], [C], [R])),
}


@pytest.mark.parametrize(("prompt", "chosen", "rejected", "want"), MEANS.values(), ids=MEANS)
def test_conversations_that_repeat_the_prompt_hold_it_once(prompt, chosen, rejected, want):
    assert read(prompt, chosen, rejected) == (*want, {})


CONTRADICT = {
    "another system": ([BRIEF, Q], [system("Be long."), Q, C], [system("Be long."), Q, R]),
    "two systems": ([Q], [BRIEF, Q, C], [system("Be long."), Q, R]),
    "a system on one side": ([Q], [BRIEF, Q, C], [Q, R]),
    "another question": ([user("other")], [Q, C], [Q, R]),
    "another question as a text": ("other", [Q, C], [Q, R]),
}


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), CONTRADICT.values(), ids=CONTRADICT)
def test_conversations_that_contradict_the_prompt_are_reported(prompt, chosen, rejected):
    *_, flags = read(prompt, chosen, rejected)
    assert list(flags) == ["prompt_unclear"]
    assert "chosen with one of the" in flags["prompt_unclear"]


def test_an_answer_that_the_prompt_begins_is_not_begun_twice():
    begun = "It is well known that of all the fruits that"
    prompt = [Q, assistant(begun)]
    assert read(prompt, begun + " grow", begun + " fall") == (prompt, [assistant(" grow")], [assistant(" fall")], {})
    *texts, flags = read([Q, assistant("An ap")], "An apple", "An apricot")
    assert texts == [[Q, assistant("An ap")], [assistant("An apple")], [assistant("An apricot")]]
    assert flags == {"prompt_repeated": "chosen and rejected begin with the prompt"}
    assert read([Q, assistant("A")], "pple", "A")[-1] == {}
    assert read([Q, assistant("A.")], "A.", "B.")[-1] == {"prompt_repeated": "chosen begins with the prompt"}


PARTS = {
    "parts": [{"type": "text", "text": "An "}, {"type": "text", "text": "apple."}],
    "parts without a type": [{"text": "An apple."}],
    "plain strings": ["An ", "apple."],
    "of another API": [{"type": "output_text", "text": "An apple.", "annotations": []}],
    "with nulls from Arrow": [{"type": "text", "text": "An apple.", "image_url": None}],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_content_in_parts_of_text_is_the_text(parts):
    assert read([Q], [assistant(parts)], [R]) == ([Q], [assistant("An apple.")], [R], {})


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            r"'chosen', message 0: .* a part of type 'image_url', and only",
        ),
        ({"type": "input_audio", "input_audio": {}}, "a part of type 'input_audio', and only text can be read"),
        ({"type": "image", "text": "a caption"}, "a part of type 'image'"),
        (7, "its content holds int 7; expected text, or a list of parts"),
    ],
)
def test_content_that_is_no_text_is_refused_by_name(part, reason):
    with pytest.raises(DataError, match=reason):
        read([Q], [assistant([{"type": "text", "text": "See "}, part])], [R])


def test_a_prompt_behind_the_marks_of_a_rendered_conversation_is_flagged():
    prompt = "What is the capital of France, and since when?"
    sides = {n: f"<|user|>\n{prompt}\n<|assistant|>\n{a}" for n, a in (("chosen", "Paris."), ("rejected", "Lyon."))}
    said = "chosen and rejected begin with '<|user|>' and the prompt"
    assert doubts({"prompt": prompt, **sides}) == {"prompt_repeated": said}
    assert doubts({"prompt": prompt, **sides, "rejected": "Lyon."}) == {}  # one answer may quote its question
    assert doubts({"prompt": prompt, "chosen": f"You ask: {prompt} 987", "rejected": f"So: {prompt} Later."}) == {}
    assert doubts({"prompt": "France?", "chosen": "<|user|> France? a", "rejected": "<|user|> France? b"}) == {}
    short = {n: f"\n\nHuman: hi there you\n\nAssistant: {a}" for n, a in (("chosen", "a"), ("rejected", "b"))}
    said = "chosen and rejected begin with 'Human:' and the prompt"
    assert doubts({"prompt": "hi there you", **short}) == {"prompt_repeated": said}
    quoted = {n: f"Good day, hi there you {a}" for n, a in (("chosen", "a"), ("rejected", "b"))}
    assert doubts({"prompt": "hi there you", **quoted}) == {}


def test_answers_that_both_repeat_the_question_are_flagged_in_a_conversation_too():
    asked = "Name a fruit that is red."
    content = {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": f"{asked} A cherry."}],
        "rejected": [{"role": "assistant", "content": f"{asked}\n\nA banana."}],
    }
    assert doubts(content) == {"prompt_repeated": "chosen and rejected begin with the prompt"}
    other = [{"role": "assistant", "content": "A banana."}]
    assert doubts({**content, "rejected": other}) == {}
    short = {n: [{**m, "content": m["content"].replace(asked, "Hi!")} for m in v] for n, v in content.items()}
    assert doubts(short) == {}
