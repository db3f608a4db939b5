"""Marks of reasoning in a text, as models of many makers write them."""

_WORDS = "think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|monologue"
TAGS = rf"(?:(?:\w+[:_])?(?:{_WORDS})(?:_content)?|cot)"
"""Also with the name of who writes it in front: ``seed:think``."""
OPEN = (
    rf"(?:<{TAGS}>|<\|{TAGS}\|>|\[THINK\]|<\|(?:begin[_▁]of[_▁]thought|thinking_start|START_THINKING|inner_prefix)\|>|<\|channel>|◁think▷"
    r"|<unused94>|<details type=\"reasoning\")"
)
"""How a block of reasoning begins, as a regular expression; in small and in capital letters."""
CLOSE = (
    rf"(?:</{TAGS}>|<\|/{TAGS}\|>|\[/THINK\]|<\|(?:end[_▁]of[_▁]thought|thinking_end|END_THINKING|inner_suffix)\|>|<channel\|>|◁/think▷"
    r"|<unused95>)"
)
"""How it ends."""
