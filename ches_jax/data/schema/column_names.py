"""What the names of columns say, by the words in them: which holds a prompt, a response, a label, a rank or a score."""

import itertools
import re
from collections.abc import Iterator, Sequence

from ches_jax.data.schema.mapping import Names


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PROMPT = _words(
    "prompt prompts instruction question query context history input user post problem messages conversations "
    "conversation dialogue dialog trajectory user_input"
)
BESIDE = _words(
    "article background context document history instructions paragraph partial passage persona prefix scenario steps "
    "turns"
)
"""Words of a column that may belong to the prompt beside it."""
SYSTEM = _words("system system_prompt system_message system_text sys")
SIDES = (
    ("chosen", "rejected"),
    ("chosen", "reject"),
    ("preferred", "dispreferred"),
    ("preferred", "nonpreferred"),
    ("preferred", "unpreferred"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("winner", "loser"),
    ("winning", "losing"),
    ("better", "worse"),
    ("positive", "negative"),
    ("good", "bad"),
    ("correct", "incorrect"),
    ("win", "lose"),
    ("pos", "neg"),
    ("j", "k"),
    ("w", "l"),
)
"""Words of the better and of the worse response, as columns are named."""
SEQUENCES = (
    tuple("abcdefghij"),
    tuple("0123456789"),
    tuple("123456789"),
    ("left", "right"),
    ("first", "second", "third", "fourth"),
)
"""How the names of columns of responses differ, from the first on."""
_RESPONSE = _words(
    "response answer completion conversation output reply generation candidate summary text ref message option "
    "continuation choice"
)
_SINGULAR = {"replies": "reply", "summaries": "summary", **{f"{w}s": w for w in _RESPONSE}}
STEM = _RESPONSE | _SINGULAR.keys()
"""Words in the name of a column of responses."""
WINNER = _words(
    "winner winners choice choices better best preferred preference pref label labels verdict vote selected selection"
)
_NUMBER = _words("index idx id number num")
"""Words of the number of a response: ``chosen_idx``."""
SEEN_OR_HEARD = _words("image images video videos audio audios")
"""Last words of columns that hold what no text says."""
TURNED = _words("safer flip flipped swap swapped reversed inverted")
"""Words of a label beside the names of the sides."""
SCORE = _words("score scores rating ratings reward rewards points votes upvotes grade grades")
RANK = _words("rank ranks ranking rankings placement placements")
ORDER = _words("ranking rankings order ordering permutation")
"""Words of a list that may hold a place for each response, or the numbers of the responses from the best on."""
PLACE = _words("position positions place places")
"""Words of a place among the best, or of where a response was shown."""


def in_sequence(columns: Sequence[str], sequence: Sequence[str]) -> Iterator[Names]:
    """Columns whose names differ in one word only, which goes through a sequence."""
    parts = {name: _words_of_name(name) for name in columns}
    for one, two in families(columns, (sequence[0], sequence[1])):
        at = next(i for i, (a, b) in enumerate(zip(parts[one], parts[two], strict=True)) if a != b)
        wanted = ([*parts[one][:at], w, *parts[one][at + 1 :]] for w in sequence[2:])
        more = (next((n for n in columns if parts[n] == words), None) for words in wanted)
        yield (one, two, *itertools.takewhile(lambda n: n is not None, more))  # type: ignore[misc]


def sequence_of(sides: Names) -> tuple[str, ...]:
    """The words in which the names of the columns differ; letters where they differ in another way."""
    fitting = (s[: len(sides)] for s in SEQUENCES if any(names == sides for names in in_sequence(sides, s)))
    return next(fitting, SEQUENCES[0][: len(sides)])


def families(columns: Sequence[str], words: Names) -> Iterator[tuple[str, str]]:
    """Pairs of columns whose names differ in one word only, these two."""
    parts = {name: _words_of_name(name) for name in columns}
    for one, two in itertools.permutations(columns, 2):
        if len(parts[one]) == len(parts[two]):
            different = [(a, b) for a, b in zip(parts[one], parts[two], strict=True) if a != b]
            if different == [words]:
                yield one, two


def _words_of_name(name: str) -> list[str]:
    """The words in which the names of columns of responses are compared."""
    return [_SINGULAR.get(w, w) for w in _joined(words_in(name))]


def _joined(words: list[str]) -> list[str]:
    """Words of a name with a "non" or "not" as part of the next one.

    >>> _joined(["non", "preferred", "output"])
    ['nonpreferred', 'output']
    """
    negated = [i for i, w in enumerate(words[:-1]) if w in ("non", "not")]
    return ["non" * (i - 1 in negated) + w for i, w in enumerate(words) if i not in negated]


def names_winner(name: str) -> bool:
    """Whether a name is one of a label, or of the number of the better response: ``winner``, ``chosen_idx``."""
    parts = {*words_in(name)}
    return bool(WINNER & parts) or ("chosen" in parts and bool(_NUMBER & parts))


def says_order(name: str) -> bool:
    """Whether a name is one of something that may say which response of a list is better."""
    return names_winner(name) or bool((RANK | ORDER | PLACE | {"safer"}) & {*words_in(name)})


def words_in(name: str) -> list[str]:
    """The words of a name: of ``winner_model_a``, ``winnerModelA`` and ``response1`` alike.

    >>> words_in("human_ref_A"), words_in("response1"), words_in("all_rm_scores")
    (['human', 'ref', 'a'], ['response', '1'], ['all', 'rm', 'scores'])
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z0-9])", " ", name)
    return re.findall(r"[a-z]+|[0-9]+", spaced.lower())
