"""Rows that say the same again: equal but for case, punctuation and white space, or nearly so.

Near-duplicates have a Jaccard similarity of their sets of word triples of at least ``NEAR``. Candidates come from
MinHash with locality-sensitive hashing (datasketch; Broder 1997), and each is then compared in full, so that none is
reported wrongly; of those beyond ``NEAR`` one in some thousands is missed.
"""

import random
import re
import unicodedata
import zlib
from collections.abc import Mapping
from typing import Any

from ches_jax.data.two_prompts import prompts_in

NEAR = 0.8
WIDTH = 3
PERMUTATIONS = 128


def normalised(text: str) -> str:
    r"""Words in lower case with single spaces.

    >>> normalised("A  Cat, a\nDOG!")
    'a cat a dog'
    """
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def text_of(value: Any) -> str:
    r"""A prompt or response as one text: of messages their contents, of token ids the numbers.

    >>> text_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), text_of((1, 2))
    ('a\nb', '1 2')
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        return "" if value is None else str(value)
    if all(isinstance(part, int) for part in value):
        return " ".join(map(str, value))
    return "\n".join(_content(part) for part in value)


def _content(message: Any) -> str:
    content = message.get("content") if isinstance(message, Mapping) else message
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) if isinstance(p, Mapping) else str(p) for p in content)
    return "" if content is None else str(content)


def pair_texts(content: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt (or both prompts, one under the other), chosen and rejected of a row as text."""
    chosen, rejected = (text_of(content.get(name, content.get(f"{name}_ids"))) for name in ("chosen", "rejected"))
    return "\n".join(map(text_of, prompts_in(content))), chosen, rejected


def shingles(text: str) -> frozenset[int]:
    """Hashes of the word triples of a text; of one shorter than that, of the whole."""
    words = normalised(text).split()
    last = max(1, len(words) - WIDTH + 1)
    return frozenset(zlib.crc32(" ".join(words[i : i + WIDTH]).encode()) for i in range(last))


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """|A and B| / |A or B|.

    >>> jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4}))
    0.5
    """
    return len(a & b) / len(a | b) if a or b else 1.0


class NearDuplicates:
    """Finds, for each row of texts, the first earlier one each of whose texts is nearly the same.

    >>> seen = NearDuplicates()
    >>> text = "the quick brown fox jumps over the lazy dog near the old stone bridge at noon"
    >>> seen.first_like("a", text), seen.first_like("b", text + " today"), seen.first_like("c", "something else")
    (None, 'a', None)
    """

    def __init__(self, threshold: float = NEAR):
        from datasketch import MinHashLSH

        self.threshold = threshold
        drawn = random.getstate()  # the index draws a name from the generator that a user may have seeded
        # candidates from a much lower similarity on: each is compared in full, so that only a missed one costs
        self._index = MinHashLSH(threshold=threshold - 0.3, num_perm=PERMUTATIONS)
        random.setstate(drawn)
        self._known: list[tuple[str, list[frozenset[int]]]] = []

    def like(self, *texts: str) -> str | None:
        """The key of the first row that ``texts`` nearly repeat, text by text."""
        return self._found([shingles(text) for text in texts])[0]

    def first_like(self, key: str, *texts: str) -> str | None:
        """As ``like``; a row that repeats none is remembered under ``key``."""
        own = [shingles(text) for text in texts]
        match, signature = self._found(own)
        if match is None:
            self._index.insert(len(self._known), signature)
            self._known.append((key, own))
        return match

    def _found(self, own: list[frozenset[int]]) -> tuple[str | None, Any]:
        from datasketch import MinHash

        signature = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
        # a text counts in its place: the same words on the other side are not the same row
        signature.update_batch(sorted(zlib.crc32(b"%d %d" % (i, s)) for i, part in enumerate(own) for s in part))
        for place in sorted(self._index.query(signature)):  # type: ignore[type-var]
            key, theirs = self._known[place]  # type: ignore[index]
            if all(jaccard(a, b) >= self.threshold for a, b in zip(own, theirs, strict=True)):
                return key, signature
        return None, signature
