"""Dialogues as packed rows of fixed length: every document keeps its own positions and sees only itself.

    token     <bos> p p <|assistant|> y <eos> | <bos> p <|assistant|> y <eos> | <pad> <pad>
    position      0 1 2             3 4     5 |     0 1             2 3     4 |     0     0
    start         0 0 0             0 0     0 |     6 6             6 6     6 |    11    12
    learned       . . .             x x     . |     . .             x x     . |     .     .

``learned`` marks the positions whose next token is part of a response (its terminator included).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments.embedded.tokenizer import EOS, SPECIAL
from experiments.embedded.world import Dialogue


class Rows(NamedTuple):
    """Packed rows, [B, T] each."""

    tokens: np.ndarray
    positions: np.ndarray
    start: np.ndarray
    learned: np.ndarray


class Document(NamedTuple):
    """One dialogue as ids, and how many of them are prompt."""

    ids: tuple[int, ...]
    prompt: int


def documents(dialogues: Iterable[Dialogue], tokenizer: Tokenizer) -> Iterator[Document]:
    """Each dialogue with its BOS (the tokenizer's) and its EOS."""
    eos = SPECIAL.index(EOS)
    for d in dialogues:
        prompt: list[int] = tokenizer.encode(d.prompt).ids
        response: list[int] = tokenizer.encode(d.response, add_special_tokens=False).ids
        yield Document((*prompt, *response, eos), len(prompt))


def batches(docs: Iterable[Document], rows: int, length: int, pad: int = 0) -> Iterator[Rows]:
    """Whole batches of packed rows; a last batch that is not full is left out.

    Raises:
      ValueError: a document is longer than a row.
    """
    batch: list[list[Document]] = []
    row: list[Document] = []
    used = 0
    for doc in docs:
        if len(doc.ids) > length:
            raise ValueError(f"a document of {len(doc.ids)} tokens, in rows of {length}")
        if used + len(doc.ids) > length:
            batch.append(row)
            row, used = [], 0
            if len(batch) == rows:
                yield pack(batch, length, pad)
                batch = []
        row.append(doc)
        used += len(doc.ids)


def pack(batch: Sequence[Sequence[Document]], length: int, pad: int = 0) -> Rows:
    """The documents of each row one after the other, padded at the end."""
    shape = (len(batch), length)
    tokens = np.full(shape, pad, np.int32)
    positions = np.zeros(shape, np.int32)
    # padding sees only itself
    start = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()
    learned = np.zeros(shape, bool)
    for b, row in enumerate(batch):
        at = 0
        for doc in row:
            end = at + len(doc.ids)
            tokens[b, at:end] = doc.ids
            positions[b, at:end] = np.arange(len(doc.ids))
            start[b, at:end] = at
            learned[b, at + doc.prompt - 1 : end - 1] = True
            at = end
    return Rows(tokens, positions, start, learned)
