"""Published chat templates: the tokens of a pair are those that transformers gives, by its mask or turn by turn.

The templates in ``chat_templates`` are written anew from what their models' cards document, without their tool parts.
"""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ches_jax.data.render import Writer
from ches_jax.data.sources import Record
from ches_jax.data.tokenize import PairTokenizer, encode_prompts
from ches_jax.errors import DataError

FOLDER = Path(__file__).parent / "chat_templates"
END = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "llama3_first": "<|eot_id|>",
    "mistral_v3": "</s>",
    "mistral_v7_tekken": "</s>",
    "zephyr": "</s>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "phi4": "<|im_end|>",
    "deepseek_r1": "<｜end▁of▁sentence｜>",
    "tulu3": "</s>",
    "command_r": "<|END_OF_TURN_TOKEN|>",
    "olmo2": "</s>",
    "granite": "<|end_of_text|>",
    "smollm3": "<|im_end|>",
    "gpt_oss": "<|return|>",
}
"""What a complete answer ends with, as the model's card says it."""
NO_SYSTEM = {"gemma"}
DAY, DATES = "2024-07-26", {"%d %b %Y": "26 Jul 2024", "%B %d, %Y": "July 26, 2024", "%d %B %Y": "26 July 2024"}


def text_of(name):
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


@pytest.fixture(scope="module")
def tokenizers():
    """Bytes, and the control tokens of all templates as added tokens; EOS is </s> everywhere."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE({c: i for i, c in enumerate(letters)} | {"Ġa": 256, "!Ċ": 257}, [("Ġ", "a"), ("!", "Ċ")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    marks = sorted({m for name in END for m in re.findall(r"<[|｜a-z_]+[^<>' ]*>|\[/?[A-Z_]+\]", text_of(name))})
    backend.add_tokens([AddedToken(m, special=i % 3 > 0) for i, m in enumerate(["<s>", "</s>", *marks, *END.values()])])
    return {
        name: PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=text_of(name)
        )
        for name in END
    }


def reference(tokenizer, prompt, answer):
    """Prompt and response as transformers has them; the clock stands still because its text is replaced."""
    template = tokenizer.chat_template
    for form, day in {**DATES, "%Y-%m-%d": DAY}.items():
        template = template.replace(f"strftime_now('{form}')", f"'{day}'")
    how = {"chat_template": template, "return_dict": True}
    whole = [*prompt, {"role": "assistant", "content": answer}]
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **how)["input_ids"]
    if "generation" in template.replace("add_generation", ""):
        full = tokenizer.apply_chat_template(whole, return_assistant_tokens_mask=True, **how)
        mask, ids = full["assistant_masks"], full["input_ids"]
        last = max(i for i, m in enumerate(mask) if m) + 1
        first = max((i + 1 for i in range(last) if not mask[i]), default=0)
        return ids[:first], ids[first:last]
    return asked, tokenizer.apply_chat_template(whole, **how)["input_ids"][len(asked) :]


SAYS = st.text(alphabet="a b!é\n", max_size=9)


@st.composite
def conversations(draw, name):
    prompt = [{"role": "system", "content": draw(SAYS)}] if name not in NO_SYSTEM and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [{"role": "user", "content": draw(SAYS)}, {"role": "assistant", "content": draw(SAYS)}]
    return [*prompt, {"role": "user", "content": draw(SAYS)}], draw(SAYS), draw(SAYS)


@pytest.mark.parametrize("name", END)
def test_prompt_chosen_and_rejected_have_the_tokens_of_transformers(name, tokenizers):
    tokenizer = tokenizers[name]
    dated = {"now": DAY} if "strftime_now" in text_of(name) else {}
    tokenise = PairTokenizer(tokenizer, 4096, template_args=dated)
    end = tokenizer.convert_tokens_to_ids(END[name])

    @settings(max_examples=12, deadline=None, database=None)
    @given(conversations(name))
    def compare(conversation):
        prompt, *answers = conversation
        sides = [[{"role": "assistant", "content": a}] for a in answers]
        content = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        (pair,) = tokenise([Record(0, "r", "line 1", content)])
        assert not {"prompt_differs", "end_unclear", "left_out", "double_eos", "double_bos"} & set(pair.flags)
        for answer, response in zip(answers, (pair.chosen, pair.rejected), strict=True):
            asked, answered = reference(tokenizer, prompt, answer)
            assert response.terminator == end
            ids = [*response.content, end]
            if "prefix_mismatch" in pair.flags:  # tokens that merge are in the responses whole
                assert [*pair.prompt, *ids] == [*asked, *answered][: len(pair.prompt) + len(ids)]
                continue
            assert list(pair.prompt) == asked
            assert answered[: len(ids)] == ids
            assert (
                not tokenizer.decode(answered[len(ids) :])
                .replace("</s>", "")
                .strip()
                .removeprefix("<|start_header_id|>assistant<|end_header_id|>")
            )
        alone = Record(0, "r", "line 1", {"prompt": prompt})
        if "prefix_mismatch" not in pair.flags:
            found = {"blank": "prompt"} if "prompt" in pair.detail.get("blank", "") else {}
            assert encode_prompts(Writer.of(tokenizer, "auto", dated), [alone]) == [(pair.prompt, found)]

    compare()


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (
            [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
            "takes no system message: put its text",
        ),
        ([{"role": "user", "content": "a"}] * 2, "two messages of one role follow each other"),
    ],
)
def test_why_a_published_template_refuses_a_conversation_is_reported(prompt, why, tokenizers):
    (encoded,) = encode_prompts(Writer.of(tokenizers["gemma"]), [Record(0, "r", "line 1", {"prompt": prompt})])
    assert encoded.ids == () and list(encoded.found) == ["template_refuses"]
    assert re.search(f"refuses the row: .*{why}", encoded.found["template_refuses"])


@pytest.mark.parametrize("name", [n for n in END if "strftime_now" in text_of(n)])
def test_a_published_template_with_a_clock_says_so(name, tokenizers):
    content = {"prompt": [{"role": "user", "content": "a"}]}
    with pytest.raises(DataError, match="writes today's date"):
        encode_prompts(Writer.of(tokenizers[name]), [Record(0, "r", "line 1", content)])
