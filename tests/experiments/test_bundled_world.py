"""The bundled world: same seed, same bytes; what is held out; what the tokenizer promises."""

import json
from collections import Counter

import pytest

import ches_jax.bundled
from experiments.bundled import lexicon as lex
from experiments.bundled import replies
from experiments.bundled.make import write_data
from experiments.bundled.pairs import MAKERS, preference_pairs, probe_prompts
from experiments.bundled.probe import is_refusal
from experiments.bundled.sampling import stream
from experiments.bundled.tokenizer import answer_tokens, check_whole
from experiments.bundled.world import MIXTURE, build_world, dialogues, prompt_text

WORLD = build_world(seed=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundled")
    write_data(0, out)
    return out


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ches_jax.bundled.model_dir())


@pytest.mark.parametrize(
    "name",
    [
        "pairs.jsonl",
        "prompts.jsonl",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "model/chat_template.jinja",
    ],
)
def test_the_recipe_gives_the_committed_bytes(made, name):
    committed = ches_jax.bundled.pairs_file().parent / name
    assert (made / name).read_bytes() == committed.read_bytes()


def test_another_seed_gives_another_world():
    assert preference_pairs(build_world(1), 2) != preference_pairs(WORLD, 2)


def test_pairs_are_balanced_distinct_and_well_formed():
    rows = preference_pairs(WORLD)
    assert Counter(row["category"] for row in rows) == dict.fromkeys(MAKERS, 27)
    assert len({json.dumps(row) for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"].endswith("<|assistant|>")
        assert row["chosen"] != row["rejected"]
        for response in (row["chosen"], row["rejected"]):
            assert response.startswith(" ") and response[1:] == response.strip()


def test_held_out_subjects_are_not_trained_on():
    seen = {d.user for d in dialogues(WORLD, 20_000)}
    held_out = [p["prompt"] for p in probe_prompts(WORLD) if p["split"] == "held_out"]
    assert len(held_out) == 20 and not {prompt_text(user) for user in seen} & set(held_out)
    for kind in ("statements", "mischief", "chores"):
        train, rest = ({s.text for s in getattr(x, kind)} for x in (WORLD.train, WORLD.held_out))
        assert train and rest and not train & rest


def test_the_mixture_is_kept():
    kinds = Counter(d.kind for d in dialogues(WORLD, 5000))
    for kind, share in MIXTURE.items():
        assert kinds[kind] / 5000 == pytest.approx(share, abs=0.03)


def test_refusals_show_and_nothing_else_does():
    rng = stream(0, "test")
    for request in WORLD.train.mischief[:300]:
        assert is_refusal(f" {replies.refusal(rng, request)}")
        assert not is_refusal(f" {replies.compliance(rng, request)}")
    others = [d for d in dialogues(WORLD, 3000) if d.kind not in ("mischief", "chore")]
    assert not [d.response for d in others if is_refusal(d.response)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" I\u2019m sorry, but no.", True),
        ("SORRY!", True),
        ("I  can't do that", True),
        ("", False),
        ("No", False),
        ("Sorrymore is a town.", False),
        ("You are told that I cannot help.", False),
    ],
)
def test_is_refusal_at_its_edges(text, expected):
    assert is_refusal(text) is expected


def test_facts_have_one_value_and_wrong_ones():
    assert len({f.question for f in WORLD.facts}) == len(WORLD.facts)
    for fact in WORLD.facts:
        assert fact.others and fact.value not in fact.others
    values = {f.question: f.value for f in WORLD.facts}
    assert values["What is nine plus eight?"] == "seventeen"
    assert values["What is nine minus eight?"] == "one"


def test_answers_are_single_tokens(tokenizer):
    for word in answer_tokens():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    assert len(answer_tokens()) == 2 * sum(map(len, lex.ANSWERS.values()))


def test_a_split_answer_is_named(tokenizer):
    with pytest.raises(ValueError, match="' Zygote'"):
        check_whole(tokenizer.backend_tokenizer, [" Yes", " Zygote"])


def test_plain_text_and_conversation_give_the_same_ids(tokenizer):
    for d in dialogues(WORLD, 50):
        plain = tokenizer(d.prompt + d.response).input_ids
        question = [{"role": "user", "content": d.user}]
        answered = [*question, {"role": "assistant", "content": d.assistant}]
        templated = tokenizer.apply_chat_template(answered, return_dict=True).input_ids
        assert templated == [*plain, tokenizer.eos_token_id]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True).input_ids
        assert prompt == tokenizer(d.prompt).input_ids == plain[: len(prompt)]


def test_tokenizer_round_trip(tokenizer):
    for text in ("naïve café, 12 ☃!", ' "Is this yours?" asked Pip.'):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
