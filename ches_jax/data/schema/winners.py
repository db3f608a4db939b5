"""Which of a row's responses is better, as a number for each of them: the higher, the better; equal ones tie.

scores  0.5, -0.5               0.5, -0.5
ranks   1, 2                    -1, -2
winner  "model_b"               0, 1        by ``order``: model_a, model_b
winner  -2                      1, 0        by ``order``: negative, positive
winner  "tie (bothbad)"         0, 0
winners 0, 1 (and tie 0)        0, 1
order   2, 0, 1                 -1, -2, 0   the numbers of the responses, the best first
"""

import re
from collections.abc import Sequence
from typing import Any

from ches_jax.data.messages import kind
from ches_jax.data.schema.values import number, word
from ches_jax.errors import DataError

FROM_0, FROM_1 = "from 0", "from 1"
"""An ``order`` of one word: the winner is the number of a response."""
SIGNS = ("negative", "positive")
"""An ``order`` of these two words, either first: the winner is a number with a sign, and 0 is a tie."""
_TIE = re.compile(
    r"(?:a )?(?:tie|tied|ties|both|neither|draw|equal|equally|(?:about |roughly |the )*same|similar|none|bothbad|"
    r"no[ _-]?preference|no[ _-]?difference|indifferent|unsure|not sure|undecided|can(?:'t|not) (?:tell|decide))\b.*|"
    r"[a-z0-9] ?=+ ?[a-z0-9]"
)


def is_tie(value: Any) -> bool:
    """Whether a label says that no response is better.

    >>> [is_tie(v) for v in ("tie", "tie (bothbad)", "both_good", "Neither", "A=B", "model_a")]
    [True, True, True, True, True, False]
    """
    return _TIE.fullmatch(word(value).replace("_", " ")) is not None


def of_winner(name: str, value: Any, order: Sequence[str], count: int) -> list[float]:
    """Numbers from a label that names the better response.

    Args:
      name: of the column, for messages.
      value: what the row says.
      order: for each response the label that prefers it, or several with ``|`` between; or ``FROM_0``, ``FROM_1``, or
        both of ``SIGNS``.
      count: of the responses.

    >>> of_winner("labels", 0, ["1", "0"], 2)
    [0.0, 1.0]

    Raises:
      DataError: the label names none of the responses, and no tie.
    """
    if isinstance(value, str) and is_tie(value):
        return [0.0] * count
    if set(order) == set(SIGNS):
        sign = number(name, value)
        best = None if sign == 0 else order.index(SIGNS[sign > 0])
    elif order in ([FROM_0], [FROM_1], (FROM_0,), (FROM_1,)):
        best = _index(name, value, FROM_0 if order[0] == FROM_0 else FROM_1, count)
    else:
        words = [{word(w) for w in o.split("|")} for o in order]
        best = next((i for i, some in enumerate(words) if word(value) in some), None)
        if best is None:
            raise DataError(f"'{name}' is {kind(value)}; expected one of {', '.join(order)}, or a tie")
    return [float(i == best) for i in range(count)]


def of_winners(names: Sequence[str], values: Sequence[Any], tie: Any) -> list[float]:
    """Numbers from one column for each response, which says whether it is the better one.

    Raises:
      DataError: several are said to win, or none and no column says that it is a tie.
    """
    flags = [_flag(name, value) for name, value in zip(names, values, strict=True)]
    tied = tie is not None and _flag("tie", tie)
    if sum(flags) > 1 or (sum(flags) == 1) == tied:
        cells = ", ".join(f"{n}={v}" for n, v in zip(names, values, strict=True))
        raise DataError(f"{cells}: expected that one response wins, or a tie")
    return [float(flag) for flag in flags]


def by_cell(value: Any, order: Sequence[str], cells: Sequence[Any]) -> Any:
    """A label of ``order`` as it is; another one as the word of ``order`` whose column holds it, where one does.

    >>> by_cell("gpt", ["model_a", "model_b"], ["llama", "gpt"])
    'model_b'
    """
    if any(word(value) in map(word, o.split("|")) for o in order):
        return value
    named = [o for o, cell in zip(order, cells, strict=True) if cell is not None and word(cell) == word(value)]
    return named[0] if len(named) == 1 else value


def of_order(name: str, value: Any, count: int) -> list[float]:
    """Numbers from a list of the numbers of all responses, from the best on, counted from 0 or from 1.

    >>> of_order("ranking", [3, 1, 2], 3)
    [-1.0, -2.0, -0.0]

    Raises:
      DataError: it is no such list.
    """
    places = [number(name, v) for v in value] if isinstance(value, list) else []
    first = 0 if 0 in places else 1
    if sorted(places) != [float(first + i) for i in range(count)]:
        raise DataError(f"'{name}' is {kind(value)}; expected the numbers of all {count} responses, the best first")
    return [-float(places.index(first + i)) for i in range(count)]


def _index(name: str, value: Any, order: str, count: int) -> int:
    first = 0 if order == FROM_0 else 1
    place = number(name, value) - first
    if not (place.is_integer() and 0 <= place < count):
        raise DataError(f"'{name}' is {kind(value)}; expected the number of a response, {first} to {count - 1 + first}")
    return int(place)


def _flag(name: str, value: Any) -> bool:
    if word(value) in ("1", "true", "yes"):
        return True
    if word(value) in ("0", "false", "no"):
        return False
    raise DataError(f"'{name}' is {kind(value)}; expected 0 or 1")
