"""What of a response is the answer, in plain letters: reasoning is cut off, marks and invisible characters are gone.

>>> final_answer("<think>Can I?</think> Sure.")
' Sure.'
>>> plain("**I can\u2019t\u200b**  help")
"i can't help"
"""

import re
import unicodedata

from ches_jax.data.reasoning import CLOSE, OPEN

FOLDED = re.compile(r"<details type=\"reasoning\".*?</details>", re.DOTALL)
"""Reasoning that a web page folds away."""
OPENED = re.compile(rf"\s*{OPEN}", re.IGNORECASE)
CLOSED = re.compile(rf".*{CLOSE}", re.IGNORECASE | re.DOTALL)
"""Up to the last end of a block: also where the template opened it, so that only the end is in the text."""
CHANNEL = re.compile(
    r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>(.*?)(?=<\|(?:end|return|call|start|channel)\|>|$)", re.DOTALL
)
"""A message of the harmony format: its channel and its text."""
STRIPPED_CHANNELS = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)(.*?)assistant\s*final(.*)", re.DOTALL)
"""The same where the special tokens were taken out of the text."""
WRAPPED = re.compile(
    r"</?(?:answer|response|final|final_answer)>|<\|(?:begin|end)_of_solution\|>|<\|(?:START|END)_RESPONSE\|>"
)
TYPOGRAPHIC = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201b\u02bc\u02b9\u2032\uff07\u02bb\u02c8", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        "\u2026": "...",
    }
)
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
WITHOUT_APOSTROPHE = re.compile(
    r"\b(i|we|you|they|he|she|it|that|this) (ca|wo|do|did|does|could|would|should|is|was)nt\b", re.IGNORECASE
)
_QUOTED = re.compile(
    r"\"[^\"\n]*\"|(?<!\w)'(?=\w)[^'\n]*(?:'\w[^'\n]*)*'(?!\w)|```.*?(?:```|$)|(?<!\w)`[^`\n]+`(?!\w)", re.DOTALL
)


def final_answer(text: str) -> str | None:
    """``text`` behind its reasoning; None where the reasoning does not end, so that there is no answer to judge."""
    if messages := CHANNEL.findall(text):
        final = [body for name, body in messages if name == "final"]
        return "".join(final) if final else None
    if stripped := STRIPPED_CHANNELS.match(text):
        return stripped[2]
    text = FOLDED.sub("", text)
    if closed := CLOSED.match(text):
        text = text[closed.end() :]
    if OPENED.match(text):
        return None
    return WRAPPED.sub("", text)


def plain(text: str) -> str:
    """Lower case, straight quotes and apostrophes, single spaces; nothing invisible, no Markdown or HTML marks."""
    text = re.sub(r"(?<=\w)[`\u00b4](?=\w)", "'", text.translate(TYPOGRAPHIC))
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    text = WITHOUT_APOSTROPHE.sub(r"\1 \2n't", re.sub(r"(?<=\w)''(?=\w)", "'", text))
    text = re.sub(r"</?(?:b|i|em|strong|p|br|u)\s*/?>", " ", text)
    text = re.sub(r"(?m)^\s*(?:[>#]+|[-*+]\s)\s*", "", text)
    text = re.sub(r"[*_~]+(?=\S)|(?<=\S)[*_~]+", "", text)
    return " ".join(text.lower().split())


def without_quotations(text: str) -> str:
    """``text`` without quotations and code: words of somebody else.

    >>> without_quotations('He said "I cannot" and left.')
    'He said  and left.'
    """
    left = _QUOTED.sub("", text.translate(TYPOGRAPHIC))
    return left if re.search(r"\w", left) else text  # all of it in quotation marks: no quotation
