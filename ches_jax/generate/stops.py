"""Where a text ends: with a stop token, before a stop string, or at its limit."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ches_jax.data.reasoning import CLOSE, OPEN
from ches_jax.errors import DataError
from ches_jax.generate.engine import Completion
from ches_jax.hf.text_part import TEXT
from ches_jax.runs.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "stop_string", "length"]
_MARK = re.compile(f"{OPEN}|{CLOSE}", re.IGNORECASE)
_CONTEXT = 4
"""Prompt tokens that a text is decoded after: what a decoder may look back at."""


@dataclass(frozen=True)
class Text:
    """A finished text."""

    text: str
    """Without its end, without special tokens but for marks of reasoning: what is the answer shows by these."""
    tokens: tuple[int, ...]
    """With the stop token or string that ended it."""
    finish_reason: FinishReason
    logp: float
    """Sum over ``tokens`` of the log-probability under the model (temperature 1, nothing cut off), nats."""


def stop_ids(
    directory: Path, tokenizer: "PreTrainedTokenizerBase", words: Sequence[str], answer_end: int | None = None
) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, config.json and the tokenizer, and those of ``words``.

    Args:
      directory: of the model.
      tokenizer: its tokenizer.
      words: more tokens that end a text.
      answer_end: what the chat template ends an answer with; it ends a text where it is a token of its own, as it
        ends a response that is scored. Many models keep the EOS of the base model, and the files name that alone.

    Raises:
      DataError: a word that is not one token.
    """
    ids_of_ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            raw = read_object(directory / name, DataError, "a model directory")
            for part in (raw, raw.get(TEXT) or {}):  # a multimodal model may say it in either
                ids = part.get("eos_token_id")
                ids_of_ends |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    if isinstance(tokenizer.eos_token_id, int):
        ids_of_ends.add(tokenizer.eos_token_id)
    if answer_end in tokenizer.added_tokens_decoder:
        ids_of_ends.add(answer_end)
    vocabulary = tokenizer.get_vocab()
    for word in words:
        if word not in vocabulary:
            raise DataError(f"--stop-tokens {word!r}: the tokenizer has no such token; for any other text use --stop")
        ids_of_ends.add(vocabulary[word])
    return tuple(sorted(ids_of_ends))


class Finisher:
    """Tokens to text, with what ends it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", ends: Sequence[int], strings: Sequence[str]):
        """``ends`` are the stop tokens, ``strings`` the stop strings."""
        self.tokenizer = tokenizer
        self.ends = frozenset(ends)
        self.strings = tuple(strings)
        added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.marks = {i: word for i, word in added.items() if _MARK.fullmatch(word)}
        """Special tokens that begin or end reasoning, which decoding would take out of the text."""

    def decoded(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text of ``tokens`` as it reads after ``prompt``: alone, some decoders drop a leading space."""
        before = list(prompt[-_CONTEXT:])
        both, head = self._decode([*before, *tokens]), self._decode(before)
        return both[len(head) :] if both.startswith(head) else self._decode(tokens)

    def _decode(self, ids: Sequence[int]) -> str:
        if self.marks.keys().isdisjoint(ids):
            return self._letters(ids)
        runs = itertools.groupby(ids, self.marks.get)
        return "".join(self._letters(list(run)) if mark is None else mark * len(list(run)) for mark, run in runs)

    def _letters(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stopped(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether the text holds a stop string."""
        return self._cut(self.decoded(prompt, tokens)) is not None

    def _cut(self, text: str) -> int | None:
        places = [i for i in (text.find(s) for s in self.strings) if i >= 0]
        return min(places) if places else None

    def __call__(self, prompt: Sequence[int], completion: Completion) -> Text:
        """The finished text."""
        tokens = completion.tokens
        text = self.decoded(prompt, tokens[:-1] if completion.ended else tokens)
        cut = self._cut(text) if self.strings else None
        if cut is not None:
            # as few tokens as hold the first stop string
            n = next(n for n in range(1, len(tokens) + 1) if self.stopped(prompt, tokens[:n]))
            return Text(text[:cut], tokens[:n], "stop_string", _sum(completion.logps[:n]))
        return Text(text, tokens, "stop" if completion.ended else "length", _sum(completion.logps))


def _sum(logps: np.ndarray) -> float:
    return float(logps.sum())
