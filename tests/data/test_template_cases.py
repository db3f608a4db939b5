"""Situations from public reports: the tokens of each are those its ``expected.json`` was computed from."""

import json

import pytest

from ches_jax.data.sources import open_pairs, open_prompts
from ches_jax.data.tokenize import PairTokenizer, encode_prompts, load_tokenizer
from ches_jax.errors import DataError

PAIRS = [
    "end_pad_is_end_of_turn",
    "end_special_closes_content",
    "end_template_ignores_generation_flag",
    "end_token_not_marked_special",
    "prompt_doubled_system_only_in_conversation",
    "prompt_doubled_text",
    "rows_content_parts",
    "rows_single_message",
]


@pytest.fixture
def cases(shared):
    if not (shared / "cases").is_dir():
        pytest.skip("needs the cases of the reference material in ../shared")
    return shared / "cases"


@pytest.mark.parametrize("name", PAIRS)
def test_prompt_and_responses_have_the_expected_tokens(cases, name):
    want = json.loads((cases / name / "expected.json").read_text())
    pairs = PairTokenizer(load_tokenizer(cases / name / "model"), 512)(
        list(open_pairs(str(cases / name / "pairs.jsonl")))
    )
    assert [p.flags for p in pairs] == [()] * len(want)
    counts = [(len(p.prompt), *(len(r.targets("include")) for r in (p.chosen, p.rejected))) for p in pairs]
    assert counts == [(w["prompt_tokens"], w["chosen_tokens"], w["rejected_tokens"]) for w in want]


def test_a_prefilled_answer_is_continued(cases):
    case = cases / "generate_prefilled_answer"
    tokenizer = PairTokenizer(load_tokenizer(case / "model"), 512)
    ((ids, _),) = encode_prompts(tokenizer.writer, list(open_prompts(str(case / "prompts.jsonl"))))
    assert list(ids) == json.loads((case / "expected.json").read_text())["prompt_ids"]


def test_a_template_that_reads_the_clock_is_pinned_first(cases):
    case = cases / "template_reads_the_clock"
    tokenizer, rows = load_tokenizer(case / "model"), list(open_pairs(str(case / "pairs.jsonl")))
    with pytest.raises(DataError, match="today's date"):
        PairTokenizer(tokenizer, 512)(rows)
    by_name, by_clock = (
        PairTokenizer(tokenizer, 512, template_args=a)(rows)
        for a in ({"date_string": "26 Jul 2024"}, {"now": "2024-07-26"})
    )
    assert by_name == by_clock
    assert "Today: 26 Jul 2024" in tokenizer.decode(list(by_name[0].prompt))
