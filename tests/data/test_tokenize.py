"""The token audit's rules, each on a tokenizer small enough to read: BOS, EOS, boundary, truncation."""

import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ches_jax.data.audit import FLAGS
from ches_jax.data.render import Writer
from ches_jax.data.sources import Record, open_pairs, row_id
from ches_jax.data.tokenize import PairTokenizer, encode_prompts, load_tokenizer, tokenizer_fingerprint
from ches_jax.errors import DataError
from ches_jax.types import Response

SHARED = Path(__file__).parents[2] / "../shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "golden").exists(), reason="shared golden data is not beside this checkout"
)

PARTS = ("chosen", "rejected")
WORDS = ["[UNK]", "<s>", "</s>", "a", "b", "c", "d", "e", "<eot>", "\n"]
UNK, BOS, EOS, A, B, C, D, E, EOT, NEWLINE = range(10)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Human: should I say no or yes to this? Assistant: No, that is not a good thing to say.",
    "Human: hello there. Assistant: Hello! Yes, you can say that. system user assistant",
] * 20


def wrapped(backend, **options):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def words_tokenizer(single="<s> $A", **options):
    """One token a word; ``single`` says what is put around a text."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.add_special_tokens([AddedToken(w, special=True) for w in ("<s>", "</s>", "<eot>")])
    if single:
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]", **options}
    return wrapped(backend, **{k: v for k, v in options.items() if v is not None})


@pytest.fixture(scope="module")
def words():
    return words_tokenizer()


@pytest.fixture(scope="module")
def bytes_bpe():
    """Byte-level BPE with ChatML, as in Qwen: no BOS, and an end-of-turn token that is not EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHATML)


@pytest.fixture(scope="module")
def metaspace():
    """Puts a dummy space before every text, as SentencePiece models do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def row(prompt, chosen, rejected, index=0):
    names = ("prompt", "chosen", "rejected")
    if isinstance(chosen, list) and all(isinstance(i, int) for i in chosen):
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
    content: dict[str, Any] = dict(zip(names, (prompt, chosen, rejected), strict=True))
    return Record(index, row_id(content), f"line {index + 1}", content)


def one(tokenizer, prompt, chosen, rejected, max_length=64, **options):
    (pair,) = PairTokenizer(tokenizer, max_length, **options)([row(prompt, chosen, rejected)])
    return pair


def chat(*contents):
    roles = ("assistant", "tool")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


USER = [{"role": "user", "content": "hello"}]


def test_plain_text_gets_bos_from_the_tokenizer_and_eos_from_here(words):
    pair = one(words, "a b", " c d", " e")
    assert pair.prompt == (BOS, A, B)
    assert pair.chosen == Response((C, D), EOS)
    assert pair.rejected == Response((E,), EOS)
    assert pair.flags == ()


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_what_a_tokenizer_puts_around_a_text_changes_no_response(single):
    pair = one(words_tokenizer(single), "a b", " c d", " e")
    assert pair.prompt == ((BOS, A, B) if "<s>" in single else (A, B))
    assert (pair.chosen, pair.rejected) == (Response((C, D), EOS), Response((E,), EOS))
    assert pair.flags == ()


def test_an_eos_in_the_text_is_the_terminator(words):
    pair = one(words, "a", " b</s>", " c")
    assert (pair.chosen, pair.flags) == (Response((B,), EOS), ())
    assert one(words_tokenizer("<s> $A </s>"), "a", " b</s>", " c") == pair


def test_two_eos_are_stripped_to_one_and_an_eos_inside_stays(words):
    pair = one(words, "a", " b</s></s>", " c</s>d")
    assert pair.flags == ("double_eos",)
    assert pair.chosen == Response((B,), EOS)
    assert pair.rejected == Response((C, EOS, D), EOS)
    assert pair.detail == {"double_eos": "chosen ends with 2, 1 inside rejected"}


def test_bos_twice_or_inside_a_response_is_flagged(words):
    pair = one(words, "<s> a", " b", " c")
    assert (pair.prompt, pair.flags) == ((BOS, BOS, A), ("double_bos",))
    pair = one(words, "a", " b<s>", " c")
    assert (pair.flags, pair.detail) == (("double_bos",), {"double_bos": "1 inside chosen"})


def test_bos_that_is_also_eos_survives():
    both = words_tokenizer("<s> $A", eos_token="<s>")
    pair = one(both, "a", " b", " c<s>d")
    assert pair.prompt == (BOS, A)
    assert pair.chosen == Response((B,), BOS)
    assert pair.flags == ("double_eos",)
    assert one(both, "", "b", "c").prompt == (BOS,)


def test_empty_parts_and_identical_responses_are_flagged(words):
    assert one(words, "", "a", "b").flags == ("empty_prompt",)
    assert one(words, "a", "", " b").flags == ("empty_chosen",)
    assert one(words, "a", " b", "</s>").flags == ("empty_rejected",)
    assert one(words, "a", " b", " b").flags == ("identical",)
    assert one(words, "a", "", "").flags == ("empty_chosen", "empty_rejected", "identical")


def test_white_space_alone_is_flagged(bytes_bpe):
    eos = bytes_bpe.eos_token
    for sides, found in {
        ("a", " \n", " b"): "chosen",
        ("a", " b", f" \n{eos}"): "rejected",  # what ends it is no word of it
        (" \t", " b", " "): "prompt, rejected",
    }.items():
        pair = one(bytes_bpe, *sides)
        assert pair.flags == ("blank",) and pair.detail == {"blank": found}
    assert one(bytes_bpe, "a", "", " ").flags == ("empty_chosen", "blank")
    blank, b = bytes_bpe(" \n")["input_ids"], bytes_bpe(" b")["input_ids"]
    assert one(bytes_bpe, b, blank, b).flags == ()  # who gives ids means them
    prompts = [Record(i, str(i), "line 1", {"prompt": text}) for i, text in enumerate((" \n", "", "a"))]
    found = [dict(prompt.found) for prompt in encode_prompts(Writer.of(bytes_bpe), prompts)]
    assert found == [{"blank": "prompt"}, {}, {}]


def test_a_merge_across_the_boundary_recuts_both_responses_at_one_place(bytes_bpe):
    pair = one(bytes_bpe, "Human: say ", "no", "Zzz")
    assert pair.flags == ("prefix_mismatch",)
    for response, text in ((pair.chosen, "no"), (pair.rejected, "Zzz")):
        ids = [*pair.prompt, *response.content]
        assert ids == bytes_bpe("Human: say " + text)["input_ids"]
    alone = bytes_bpe("Human: say ")["input_ids"]
    assert pair.prompt == tuple(alone[: len(pair.prompt)])
    merged = bytes_bpe.decode(bytes_bpe("Human: say no")["input_ids"][len(pair.prompt)])
    assert merged.startswith(" ")
    recut = f"prompt of {len(alone)} tokens recut to {len(pair.prompt)} before {merged!r}"
    assert pair.detail == {"prefix_mismatch": recut}


def test_a_dummy_prefix_stays_out_of_the_responses(metaspace):
    pair = one(metaspace, "Human: hello. Assistant:", " No", " Yes")
    joint = metaspace("Human: hello. Assistant: No")["input_ids"]
    assert [*pair.prompt, *pair.chosen.content] == joint
    assert pair.prompt[0] == 1
    assert pair.flags == ()
    glued = one(metaspace, "Human: hello.\n", "No", "Yes")
    space = metaspace.convert_tokens_to_ids("▁")
    assert space not in (glued.chosen.content[0], glued.rejected.content[0])


def test_an_end_of_turn_token_terminates_a_templated_response(bytes_bpe):
    end = bytes_bpe.convert_tokens_to_ids("<|im_end|>")
    pair = one(bytes_bpe, USER, chat("No"), chat("Yes"))
    assert pair.flags == ()
    assert pair.chosen == Response(tuple(bytes_bpe("No")["input_ids"]), end)
    assert pair.rejected == Response(tuple(bytes_bpe("Yes")["input_ids"]), end)
    assert bytes_bpe.decode(pair.prompt).endswith("<|im_start|>assistant\n")


def test_white_space_before_the_end_of_turn_belongs_to_the_content(bytes_bpe):
    pair = one(bytes_bpe, USER, chat("No\n"), chat("Yes"))
    assert bytes_bpe.decode(pair.chosen.content) == "No\n"


def test_end_of_turn_tokens_of_earlier_messages_are_no_findings(bytes_bpe):
    pair = one(bytes_bpe, USER, chat("call", "result", "No"), chat("Yes"))
    assert pair.flags == ()
    assert pair.chosen.content.count(bytes_bpe.convert_tokens_to_ids("<|im_end|>")) == 2
    doubled = one(bytes_bpe, USER, chat("No<|im_end|>"), chat("Yes<|im_end|>Yes"))
    assert doubled.detail == {"double_eos": "chosen ends with 2, 1 inside rejected"}


def test_an_end_of_text_after_the_end_of_turn_is_not_a_second_end(words, monkeypatch):
    template = "{% for m in messages %}{{ m.content }} <eot> {% endfor %}"
    template += "{% if not add_generation_prompt %}</s>{% endif %}"
    monkeypatch.setattr(words, "chat_template", template)
    pair = one(words, [{"role": "user", "content": "a"}], chat("b"), chat("c d"))
    assert (pair.prompt, pair.flags) == ((A, EOT), ())
    assert (pair.chosen, pair.rejected) == (Response((B,), EOT), Response((C, D), EOT))


def test_a_template_that_writes_no_end_gets_eos_and_one_that_writes_bos_is_not_helped(words, monkeypatch):
    template = "<s>{% for m in messages %} {{ m.content }}{% endfor %}"
    monkeypatch.setattr(words, "chat_template", template)
    pair = one(words, [{"role": "user", "content": "a"}], chat("b"), chat("c"))
    assert (pair.prompt, pair.chosen, pair.flags) == ((BOS, A), Response((B,), EOS), ())


def test_a_template_that_changes_the_prompt_is_recut(words, monkeypatch):
    # as templates do that open a thought in the generation prompt
    template = "{% for m in messages %} {{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %} d{% endif %}"
    monkeypatch.setattr(words, "chat_template", template)
    pair = one(words, [{"role": "user", "content": "a"}], chat("b"), chat("c"))
    assert (pair.prompt, pair.chosen.content, pair.flags) == ((A,), (B,), ("prompt_differs",))
    assert pair.detail == {"prompt_differs": "an answer begins with 'd' in the prompt and with '' in the conversation"}


def test_plain_text_can_be_wrapped_as_a_user_turn(bytes_bpe):
    wrapped_text = one(bytes_bpe, "hello", "No", "Yes", template="always")
    conversation = one(bytes_bpe, USER, chat("No"), chat("Yes"))
    assert wrapped_text.prompt == conversation.prompt
    assert wrapped_text.chosen == conversation.chosen


def test_token_ids_are_taken_as_they_are_and_audited_alike(words):
    pair = one(words, [A, B], [C, EOS], [D])
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        (A, B),
        Response((C,), EOS),
        Response((D,), EOS),
    )
    assert one(words, [BOS, BOS, A], [B], [C]).flags == ("double_bos",)
    assert one(words, [A], [B, EOS, EOS], [C]).flags == ("double_eos",)
    assert one(words, [], [B], [EOS]).flags == ("empty_prompt", "empty_rejected")
    assert one(words, [A], [B], [UNK]).rejected == Response((UNK,), EOS)


def test_given_ids_end_with_what_the_template_ends_an_answer_with(words, monkeypatch):
    """A special token that neither the tokenizer nor the template ends a text with may be content: it is flagged."""
    unknown = one(words, [A], [B, EOT, NEWLINE], [UNK])
    assert (unknown.chosen, unknown.flags) == (Response((B, EOT, NEWLINE), EOS), ("end_unclear",))
    assert unknown.detail == {"end_unclear": "chosen ends with '<eot>', which is not known to end a response"}
    monkeypatch.setattr(words, "chat_template", "{% for m in messages %}{{ m.content }} <eot> {% endfor %}")
    known = one(words, [A], [B, EOT, NEWLINE], [UNK])
    assert (known.chosen, known.rejected, known.flags) == (Response((B,), EOT), Response((UNK,), EOS), ())


def test_given_ids_of_a_pair_give_the_pair_again(bytes_bpe):
    first = one(bytes_bpe, USER, chat("No"), chat("Yes"))
    ids = [list(first.prompt), *(list(r.targets("include")) for r in (first.chosen, first.rejected))]
    again = one(bytes_bpe, ids[0], ids[1], ids[2])
    assert (again.prompt, again.chosen, again.rejected) == (
        first.prompt,
        first.chosen,
        first.rejected,
    )


def test_a_response_is_cut_on_the_right_and_loses_its_end(words):
    fits = one(words, "a", " b c", " d", max_length=5)
    assert (fits.chosen, fits.flags) == (Response((B, C), EOS), ())
    no_end = one(words, "a", " b c", " d", max_length=4)
    assert (no_end.chosen, no_end.flags) == (Response((B, C), None), ("truncated_chosen",))
    assert no_end.rejected == Response((D,), EOS)
    pair = one(words, "a", " b c", " d", max_length=3)
    assert (pair.chosen, pair.rejected) == (Response((B,), None), Response((D,), None))
    assert pair.flags == ("truncated_chosen", "truncated_rejected")
    assert pair.detail["truncated_chosen"] == "5 tokens, --max-length 3"
    without = one(words, "a", " b c", " d", max_length=4, eos="exclude")
    assert (without.chosen, without.flags) == (Response((B, C), EOS), ())


def test_a_terminator_that_is_given_counts_and_none_is_added(words):
    cut, ended = one(words, "a", " b c", " d</s>", eos="given"), one(words, [A], [B, C], [D, EOS], eos="given")
    for pair in (cut, ended):
        assert (pair.chosen, pair.rejected) == (Response((B, C), None), Response((D,), EOS))
        assert [r.targets("given") for r in (pair.chosen, pair.rejected)] == [(B, C), (D, EOS)]
    assert one(words, [A], [B, C], [D, EOS]).chosen == Response((B, C), EOS)


def test_responses_that_truncation_makes_equal_are_identical(words):
    pair = one(words, "a", " b c", " b d", max_length=3)
    assert pair.flags == ("identical", "truncated_chosen", "truncated_rejected")


def test_a_prompt_is_never_cut(words):
    pair = one(words, "a b c", " d", " e", max_length=4)
    assert (pair.prompt, pair.flags) == ((BOS, A, B, C), ("prompt_too_long",))
    assert pair.detail == {"prompt_too_long": "4 tokens, --max-length 4"}


def test_without_eos_the_user_is_told_what_to_do():
    bare = words_tokenizer(eos_token=None)
    with pytest.raises(DataError, match=r"no EOS token.* use --eos exclude"):
        PairTokenizer(bare, 8)
    assert one(bare, "a", " b", " c", eos="exclude").chosen == Response((B,), None)


def why_unfit(pair, flag):
    """What is said of a row without tokens; it has this one flag."""
    assert pair.flags == (flag,)
    assert pair.prompt == pair.chosen.content == pair.rejected.content == ()
    return pair.detail[flag]


def test_ids_beyond_the_models_vocabulary_are_flagged(words):
    message = why_unfit(one(words, "a", " b", " e", vocab_size=7), "unknown_token")
    assert re.match(r"line 1: token id 7, but .* has 7 .*: 10\)", message)
    assert one(words, "a", " b", " e", vocab_size=8).flags == ()
    message = why_unfit(one(words_tokenizer(eos_token="<s>"), [0], [0], [0], vocab_size=1), "unknown_token")
    assert message.startswith("line 1: token id 1, but")  # EOS itself
    assert one(words_tokenizer(eos_token="<s>"), [0], [0], [0], vocab_size=1, eos="exclude").prompt == (0,)
    with pytest.raises(DataError, match="--max-length 1: expected room"):
        PairTokenizer(words, 1)


def test_a_row_that_cannot_be_written_is_named(words):
    message = why_unfit(one(words, USER, chat("b"), chat("c")), "template_refuses")
    assert message.startswith("line 1: the row is a conversation")


def test_a_row_that_cannot_be_read_is_flagged_beside_the_others(words):
    content = {"prompt": "a", "chosen": " b", "rejected": " e"}
    rows = [
        Record(0, "x" * 32, "line 1", {}, fault="no column 'rejected'"),
        Record(1, row_id(content), "line 2", content),
    ]
    bad, good = PairTokenizer(words, 8)(rows)
    assert why_unfit(bad, "unreadable") == "line 1: no column 'rejected'"
    assert good == PairTokenizer(words, 8)(rows[1:])[0]


def mixed_rows():
    return [
        row("Human: hello", " No", " Yes", 0),
        row([5, 6], [7], [8, 9], 1),
        row(USER, chat("No"), chat("Yes"), 2),
        row("Human: say ", "no", "yes", 3),
        row(USER, chat("Hello there."), chat(""), 4),
        row("", "no", "no", 5),
    ]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_pair_does_not_depend_on_its_batch(bytes_bpe, size):
    tokenise, rows = PairTokenizer(bytes_bpe, 24), mixed_rows()
    together = tokenise(rows)
    apart = [p for i in range(0, len(rows), size) for p in tokenise(rows[i : i + size])]
    assert together == apart
    assert tokenise(rows[::-1])[::-1] == together
    assert [p.index for p in together] == list(range(6))


@pytest.mark.parametrize("template", ["auto", "always"])
def test_a_prompt_alone_has_the_tokens_it_has_before_a_response(bytes_bpe, words, metaspace, template):
    rows = [r for r in mixed_rows() if template == "auto" or "prompt" in r.content]
    # a prompt that ends in a space may share a token with its response
    rows = [r for r in rows if not str(r.content.get("prompt")).endswith(" ")]
    for tokenizer in (bytes_bpe, words, metaspace):
        readable = [r for r in rows if tokenizer.chat_template or not isinstance(r.content.get("prompt"), list)]
        readable = readable if tokenizer.chat_template or template == "auto" else []
        pairs = PairTokenizer(tokenizer, 64, template=template)(readable)
        alone = [
            Record(r.index, r.row_id, r.where, {k: r.content[k] for k in r.content if "prompt" in k}) for r in readable
        ]
        prompts = encode_prompts(Writer.of(tokenizer, template), alone)
        assert [p.ids for p in prompts] == [p.prompt for p in pairs]


TEXTS = st.text(alphabet="anoy  HZé\n", max_size=12)


@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS, max_length=st.integers(2, 30))
def test_nothing_is_lost_or_added_but_by_a_flag(bytes_bpe, prompt, chosen, rejected, max_length):
    pair = one(bytes_bpe, prompt, chosen, rejected, max_length=max_length)
    assert set(pair.flags) <= set(FLAGS)
    for name, text, response in (
        ("chosen", chosen, pair.chosen),
        ("rejected", rejected, pair.rejected),
    ):
        joint = bytes_bpe(prompt + text)["input_ids"]
        ids = [*pair.prompt, *response.content]
        assert ids == joint[: len(ids)]
        assert (f"truncated_{name}" in pair.flags) == (response.terminator is None)
        if response.terminator is not None:
            assert ids == joint
        if "prompt_too_long" not in pair.flags:
            assert len(pair.prompt) + len(response.targets("include")) <= max_length


def test_a_saved_tokenizer_is_loaded_and_has_the_same_fingerprint(words, tmp_path):
    words.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert one(loaded, "a", " b", " c") == one(words, "a", " b", " c")
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(words)
    assert tokenizer_fingerprint(words_tokenizer("$A")) != tokenizer_fingerprint(words)
    words(["a"], truncation=True, max_length=1)  # leaves a setting behind
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(words)


def test_a_class_nobody_knows_still_has_its_tokenizer_json(words, tmp_path):
    words.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    named = {**json.loads(config.read_text()), "tokenizer_class": "NobodysTokenizer"}
    config.write_text(json.dumps(named))
    assert load_tokenizer(tmp_path).eos_token == "</s>"


@pytest.mark.parametrize(
    "settings",
    ['{"eos_token": {"content": "</s>"}', '{"eos_token": {"content": "</s>"}}', '\ufeff{"eos_token": "</s>"}'],
)
def test_settings_that_cannot_be_read_are_an_error_and_not_left_out(words, tmp_path, settings):
    """Without them the tokenizer has no EOS and no chat template, and says nothing of it."""
    words.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot be loaded \(.*\); look at tokenizer.json and tokenizer_config.json"):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such directory; expected a model directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match="no tokenizer in this directory; expected"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be loaded .* not there: tokenizer_config.json"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def sentencepiece_alone(tmp_path_factory):
    """A directory with a Llama tokenizer as tokenizer.model alone, and the model that sentencepiece reads from it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder, file = tmp_path_factory.mktemp("sentencepiece"), io.BytesIO()
    texts = ["name a fruit: an apple, a plum or a pear", "say yes or no, and say why", "the end of the story"]
    as_llama = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, vocab_size=310, model_type="bpe", minloglevel=2, **as_llama
    )
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True, "legacy": False}))
    return folder, sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


@pytest.mark.parametrize("text", ["name a fruit:", "say no", "zebra, \nzoo!", "say no ", "say  no   ", "\n say"])
def test_sentencepiece_alone_has_the_ids_of_sentencepiece(sentencepiece_alone, text):
    folder, model = sentencepiece_alone
    assert load_tokenizer(folder)(text)["input_ids"] == [model.bos_id(), *model.encode(text)]


@pytest.mark.parametrize("place", ["directory", "hub"])
def test_without_the_package_the_message_names_sentencepiece(sentencepiece_alone, monkeypatch, place):
    """Transformers would ask for tiktoken, which does not help."""
    from transformers import AutoTokenizer

    def fails(*args, **options):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: known(name, *a) if name != "sentencepiece" else None
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(DataError, match=r"package sentencepiece reads; install it with pip install 'ches-jax\[sent"):
        load_tokenizer(sentencepiece_alone[0] if place == "directory" else "owner/name")
    monkeypatch.undo()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(DataError, match="the tokenizer cannot be loaded"):  # it is there: something else is wrong
        load_tokenizer(sentencepiece_alone[0])


def test_a_tokenizer_that_is_a_program_in_the_directory_is_refused_as_one(tmp_path):
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tiktoken.model").write_text("x")
    with pytest.raises(DataError, match=r"a program in the directory \(auto_map .* convert the tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"no tokenizer in this directory; expected tokenizer\.json"):
        load_tokenizer(tmp_path)


def golden(family):
    folder = SHARED / "golden" / family
    tokenizer = load_tokenizer(folder / "policy")
    want = json.loads((folder / "golden.json").read_text())["pairs"]
    return tokenizer, want


def assert_golden(pairs, want, eos):
    for pair, ids in zip(pairs, want, strict=True):
        assert pair.flags == ()
        assert pair.prompt == tuple(ids["prompt_ids"])
        assert pair.chosen == Response(tuple(ids["chosen_ids"]), eos)
        assert pair.rejected == Response(tuple(ids["rejected_ids"]), eos)


@needs_shared
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_golden_ids_from_text_and_from_conversations(family, tmp_path):
    tokenizer, want = golden(family)
    tokenise = PairTokenizer(tokenizer, 2048, vocab_size=len(tokenizer))
    path = SHARED / "golden/pairs.jsonl"
    assert_golden(tokenise(list(open_pairs(str(path)))), want, tokenizer.eos_token_id)
    # The template writes the space that every response text begins with.
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    calls = [{"role": "user", "content": r["query"]} for r in rows]
    whole = [
        {n: [q, {"role": "assistant", "content": r[n].removeprefix(" ")}] for n in r if n in PARTS}
        for q, r in zip(calls, rows, strict=True)
    ]
    (tmp_path / "whole.jsonl").write_text("\n".join(map(json.dumps, whole)))
    pairs = tokenise(list(open_pairs(str(tmp_path / "whole.jsonl"))))
    assert_golden(pairs, want, tokenizer.eos_token_id)


@needs_shared
def test_real_dialogues_tokenise_without_findings():
    tokenizer, _ = golden("llama")
    rows = list(open_pairs(str(SHARED / "data/hh_harmless_base_test.jsonl")))[:300]
    assert rows[86].content["chosen"] == " "
    assert {p.index: p.flags for p in PairTokenizer(tokenizer, 4096)(rows) if p.flags} == {86: ("blank",)}
