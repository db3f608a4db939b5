"""Rows whose two responses answer prompts of their own (joint preferences): ``chosen_prompt``, ``rejected_prompt``.

Such a row is two responses that share nothing. Each is written and tokenised as a pair of two equal responses to its
prompt, so that all that is known of one prompt holds for two.
"""

from collections.abc import Mapping
from typing import Any

SIDES = ("chosen", "rejected")
TWO_PROMPTS = ("chosen_prompt", "rejected_prompt")
TWO_PROMPT_IDS = ("chosen_prompt_ids", "rejected_prompt_ids")


def has_two_prompts(content: Mapping[str, Any]) -> bool:
    """Whether a canonical row has a prompt for each response.

    >>> has_two_prompts({"chosen_prompt": "1+1?", "rejected_prompt": "1+2?", "chosen": " 2", "rejected": " 2"})
    True
    """
    return TWO_PROMPTS[0] in content or TWO_PROMPT_IDS[0] in content


def halves(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each response of a canonical row of two prompts, as a pair of two equal ones.

    >>> halves({"chosen_prompt": "1+1?", "rejected_prompt": "1+2?", "chosen": " 2", "rejected": " 4"})[1]
    {'prompt': '1+2?', 'chosen': ' 4', 'rejected': ' 4'}
    """
    ids = "_ids" if TWO_PROMPT_IDS[0] in content else ""
    names = [f"{side}{end}" for side in SIDES for end in (f"_prompt{ids}", ids)]
    rest = {name: value for name, value in content.items() if name not in names}
    return [
        {
            f"prompt{ids}": content[f"{side}_prompt{ids}"],
            **{f"{s}{ids}": content[f"{side}{ids}"] for s in SIDES},
            **rest,
        }
        for side in SIDES
    ]


def prompts_in(content: Mapping[str, Any]) -> list[Any]:
    """The prompt of a canonical row, or both, as they are.

    >>> prompts_in({"prompt": "1+1?", "chosen": " 2", "rejected": " 3"})
    ['1+1?']
    """
    names = ("prompt", "prompt_ids", *TWO_PROMPTS, *TWO_PROMPT_IDS)
    return [content[name] for name in names if name in content]
