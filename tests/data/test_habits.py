"""What published templates are known to do is found by probes."""

import pytest

from ches_jax.data.habits import HABITS, describe, habits
from ches_jax.data.template import ChatTemplate
from tests.data.test_published_templates import END, text_of, tokenizers  # noqa: F401 (a fixture)

KNOWN = {
    "qwen2_5": [],
    "qwen3": ["drops_thoughts"],
    "llama2": ["strips", "system_in_user", "alternates"],
    "llama3": ["clock", "strips"],
    "llama3_first": ["always_header", "strips"],
    "mistral_v3": ["system_in_user"],
    "mistral_v7_tekken": [],
    "zephyr": [],
    "gemma": ["strips", "no_system", "alternates"],
    "phi3": [],
    "phi4": [],
    "deepseek_r1": ["drops_thoughts", "drops_last_thought"],
    "tulu3": [],
    "command_r": ["strips"],
    "olmo2": [],
    "granite": ["clock"],
    "smollm3": ["clock"],
    "gpt_oss": ["clock"],
}
MADE = {
    "no_end": "{% for m in messages %}|{{ m.role }}|{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}|assistant|{% endif %}",
    "no_header": "{% for m in messages %}|{{ m.role }}|{{ m.content }}</s>{% endfor %}",
    "opens_otherwise": "{% for m in messages %}|{{ m.role }}|{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}|assistant|<think>{% endif %}",
    "drops_system": "{% for m in messages if m.role != 'system' %}|{{ m.role }}|{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}|assistant|{% endif %}",
    "parts": "{% for m in messages %}|{{ m.role }}|{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}|assistant|{% endif %}",
}


@pytest.mark.parametrize("name", END)
def test_habits_of_published_templates(name, tokenizers):  # noqa: F811
    assert habits(ChatTemplate(tokenizers[name])) == KNOWN[name]


@pytest.mark.parametrize("name", MADE)
def test_habits_of_unusual_templates(name, tokenizers):  # noqa: F811
    import copy

    tokenizer = copy.copy(tokenizers["phi4"])
    tokenizer.chat_template = MADE[name]
    template = ChatTemplate(tokenizer)
    assert name in habits(template) and not {"no_header", "always_header"} <= set(habits(template))
    assert HABITS[name] in describe(template)


def test_every_habit_is_found_somewhere():
    assert set(HABITS) == {h for found in KNOWN.values() for h in found} | set(MADE)


def test_the_end_of_an_answer_is_reported(tokenizers):  # noqa: F811
    assert describe(ChatTemplate(tokenizers["phi4"])) == "ends an answer with '<|im_end|>'"
    assert "today's date" in describe(ChatTemplate(tokenizers["llama3"]))
    assert text_of("phi4") == tokenizers["phi4"].chat_template
