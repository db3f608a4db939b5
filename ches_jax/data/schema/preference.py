"""Which response is better, by a label, flags, scores or ranks: the words of a declaration that say so.

A way that can be read as its opposite is refused with both readings, and so are two ways that contradict each other.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ches_jax.data.nested import decoded
from ches_jax.data.prompts import lookup
from ches_jax.data.schema.column_names import (
    ORDER,
    PLACE,
    RANK,
    SCORE,
    SEQUENCES,
    WINNER,
    in_sequence,
    names_winner,
    sequence_of,
    words_in,
)
from ches_jax.data.schema.column_values import (
    Rows,
    are_flags,
    are_labels,
    are_lists,
    are_numbers,
    is_numeric,
    two_readings,
)
from ches_jax.data.schema.mapping import Names, Schema, canonical_rows, from_words
from ches_jax.data.schema.values import word
from ches_jax.data.schema.winners import FROM_0, FROM_1, SIGNS, is_tie
from ches_jax.errors import DataError

_NO_NAMES = frozenset({"true", "false", "yes", "no"})
_COMPARISON = re.compile(r"([a-z0-9]+) ?(>+|<+) ?([a-z0-9]+)")


def preference_of_columns(rows: Rows, columns: Sequence[str], sides: Names) -> dict[str, Any]:
    """The words that say which of some columns is better."""
    rest = [n for n in columns if n not in sides]
    tie = [n for n in rest if words_in(n)[-1:] == ["tie"]]
    fitting: list[dict[str, Any]] = [
        {"winners": list(those), **({"tie": tie[0]} if tie else {})}
        for those in _placed(rest, sides)
        if (WINNER | {"is", "wins"}) & {*words_in(those[0])}
        and not RANK & {*words_in(those[0])}
        and all(are_flags(rows, n) for n in those)
    ]
    if not fitting:
        labels = [n for n in rest if names_winner(n) and are_labels(rows, n)]
        fitting = _labels(rows, [n for n in labels if not (SCORE | RANK) & {*words_in(n)}], sides)
    numbers = [
        {score_or_rank(rows, *those): list(those)}
        for those in _placed(rest, sides)
        if (SCORE | RANK) & {*words_in(those[0])} and all(are_numbers(rows, n) for n in those)
    ]
    return one_preference(contradicting(rows, list(sides), [*fitting, *numbers]), " and ".join(sides), columns)


def _labels(rows: Rows, names: Sequence[str], sides: Names) -> list[dict[str, Any]]:
    """The labels whose words are understood; beside them one that is not has to prefer the same responses.

    Raises:
      DataError: two readings of a label, where no other one says which is meant.
    """
    known: list[dict[str, Any]] = []
    unclear: dict[str, DataError] = {}
    for name in names:
        try:
            known.append({"winner": name, "order": order_of_label(rows, name, sides)})
        except DataError as error:
            unclear[name] = error
    for name, error in unclear.items():
        if not known or not _goes_with(rows, name, {"responses": list(sides), **known[0]}):
            raise error
    return known


def _goes_with(rows: Rows, name: str, words: Mapping[str, Any]) -> bool:
    """Whether a label never has the same word where one response is the best and where another one is."""
    schema = from_words(words)
    best_of: dict[str, set[int]] = {}
    for row in rows:
        with contextlib.suppress(DataError):
            scores = canonical_rows(schema, row)[0][1]["scores"]
            if len({*scores}) > 1 and row.get(name) not in (None, ""):
                best_of.setdefault(word(row[name]), set()).add(scores.index(max(scores)))
    return all(len(best) == 1 for best in best_of.values())


def _placed(columns: Sequence[str], sides: Names) -> Iterator[Names]:
    """Columns, as many as there are responses, whose names differ as those do."""
    for sequence in (q for q in SEQUENCES if any(names == sides for names in in_sequence(sides, q))):
        yield from (names[: len(sides)] for names in in_sequence(columns, sequence) if len(names) >= len(sides))


def preference_of_list(rows: Rows, columns: Sequence[str], listed: str) -> dict[str, Any]:
    return one_preference(contradicting(rows, [listed], ways_of_list(rows, columns, listed)), listed, columns)


def ways_of_list(rows: Rows, columns: Sequence[str], listed: str) -> list[dict[str, Any]]:
    """The words of each column that may say which response of a list is better."""
    head, _, key = listed.partition(".")
    names = [n for n in columns if n != head]
    inside = {k for row in rows for m in (decoded(row.get(head)) if key else []) or [] for k in m} - {key, ""}
    lists = [n for n in (*names, *(f"{head}.{k}" for k in sorted(inside))) if are_lists(rows, n)]
    ways: list[dict[str, Any]] = []
    for name in lists:
        parts = {*words_in(name.split(".")[-1])}
        if parts & ORDER and "." not in name:
            ways += _ordered(rows, name, listed)
        elif parts & (SCORE | RANK):
            ways.append({score_or_rank(rows, name): name})
    if not ways and (places := [n for n in lists if PLACE & {*words_in(n.split(".")[-1])}]):
        raise two_readings(
            f"'{places[0]}' is a rank (the lower, the better)",
            "it says where the response was shown",
            f"--columns responses={listed} ranks={places[0]}, or another word that says which is better "
            "(with prompt=...; docs/data.md)",
        )
    labels = [n for n in names if names_winner(n) and are_labels(rows, n) and are_numbers(rows, n)]
    return ways + [{"winner": n, "order": [_start(rows, n, listed)]} for n in labels]


def _ordered(rows: Rows, name: str, listed: str) -> list[dict[str, Any]]:
    """A list of ranks, or of the numbers of the responses from the best on: the same for two responses, not for more.

    Raises:
      DataError: both fit, and differ.
    """
    ways = [{"ranks": name}, {"best_first": name}]
    readable = [w for w in ways if _says_of_half(rows, {"responses": listed, **w})]
    if len(readable) == len(ways) and not _agree(rows, [listed], *ways):
        raise two_readings(
            f"'{name}' has a rank for each response (the lower, the better)",
            "it lists the numbers of the responses, the best first",
            f"--columns responses={listed} ranks={name} or best_first={name} (with prompt=...)",
        )
    return readable[:1]


def _says_of_half(rows: Rows, words: Mapping[str, Any]) -> bool:
    """Whether the words say of half of the rows at least which response is better."""
    schema, said = from_words(words), 0
    for row in rows:
        with contextlib.suppress(DataError):
            said += bool(canonical_rows(schema, row))
    return said * 2 >= len(rows)


def one_preference(fitting: list[dict[str, Any]], responses: str, columns: Sequence[str]) -> dict[str, Any]:
    if len(fitting) > 1:
        one, two = (_described(f) for f in fitting[:2])
        raise two_readings(f"{one} says which response is better", f"{two} does", f"--columns {one} ... or {two} ...")
    if not fitting:
        best_first = f"; if they are listed best first, --columns prompt=... responses={responses} says so"
        raise DataError(
            f"responses in {responses}, but no column says which is better; found: {', '.join(columns)}; name it with "
            "--columns prompt=... responses=... and winner=... order=..., or scores=..., or ranks=..."
            + f"{best_first if ' and ' not in responses else ''} (docs/data.md)"
        )
    return fitting[0]


def _described(words: Mapping[str, Any]) -> str:
    """Words of a declaration as a user writes them."""
    tuples = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in words.items() if k != "winner"}
    fields: dict[str, Any] = {**words, **tuples}
    return Schema(**fields).describe().replace(", ", " ")


def order_of_label(rows: Rows, name: str, sides: Names) -> list[str]:
    """The word of a label for each of the columns.

    Raises:
      DataError: two readings of the label, or none.
    """
    said = {word(r[name]) for r in rows if r.get(name) not in (None, "") and not is_tie(r[name])}
    places = sequence_of(sides)
    if order := _by_place(said, places) or _compared(said, places) or _by_cell(rows, name, sides):
        return order
    one, *others = sides
    if len(others) > 1:
        return _order_of_several(said, name, sides)
    (two,) = others
    words = f"--columns responses={one},{two} winner={name} order="
    if all(map(is_numeric, said)) and any(float(w) < 0 for w in said):
        raise two_readings(
            f"a negative '{name}' means that {one} is better",
            f"that {two} is",
            f"{words}{','.join(SIGNS)} or order={','.join(SIGNS[::-1])} (with prompt=...)",
        )
    counts = not {"label", "labels", "preference", "pref"} & {*words_in(name)}  # 0 and 1 of a label may be no and yes
    if said <= {"0", "1"} and "0" in said and counts and places != ("1", "2"):
        return ["0", "1"]  # the number of the response
    if said == {"1", "2"} and places != ("0", "1"):
        return ["1", "2"]
    if "1" in said and said <= {"0", "1", "2"} and counts and places not in (("0", "1"), ("1", "2")):
        ties = [f" and {n} is a tie" if said > {"1", n} else "" for n in ("2", "0")]
        raise two_readings(
            f"'{name}' 1 means that {two} is better, counted from 0{ties[0]}",
            f"that {one} is, counted from 1{ties[1]}",
            f"{words}0,1 or order=1,2 (with prompt=...)",
        )
    low, high = _words_of_two(said)
    raise two_readings(
        f"'{name}' {low} means that {one} is better",
        f"that {two} is",
        f"{words}{low},{high} or order={high},{low} (with prompt=...)",
    )


def _order_of_several(said: set[str], name: str, sides: Names) -> list[str]:
    """The number of the better one of more than two columns, counted as some row shows."""
    numbers = [str(i) for i in range(len(sides) + 1)]
    listed = ",".join(sides)
    if not said <= {*numbers}:
        raise DataError(
            f"'{name}' says {', '.join(sorted(said)[:3])}, and it is not clear which of {listed} that is; name its "
            f"word for each with --columns responses={listed} winner={name} order=... (with prompt=...)"
        )
    if ("0" in said) == (numbers[-1] in said):
        raise two_readings(
            f"'{name}' counts {listed} from 0",
            "it counts them from 1",
            f"--columns responses={listed} winner={name} order={','.join(numbers[:-1])} or "
            f"order={','.join(numbers[1:])} (with prompt=...)",
        )
    return numbers[:-1] if "0" in said else numbers[1:]


def _by_cell(rows: Rows, name: str, sides: Names) -> list[str]:
    """Columns that differ as the responses do, one of which holds the label of each row: names of models, texts."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    labelled = [r for r in rows if r.get(name) not in (None, "") and not is_tie(r[name])]
    if not labelled or any(is_numeric(r[name]) or word(r[name]) in _NO_NAMES for r in labelled):
        return []
    for pair in _placed(columns, sides):
        if name not in pair and all([word(r.get(n)) == word(r[name]) for n in pair].count(True) == 1 for r in labelled):
            return list(pair)
    return []


def _words_of_two(said: set[str]) -> tuple[str, str]:
    """Two labels of which at least one was seen.

    >>> _words_of_two({"second"}), _words_of_two({"1"}), _words_of_two({"up", "down"}), _words_of_two({"up"})
    (('first', 'second'), ('0', '1'), ('down', 'up'), ('up', 'OTHER'))
    """
    pairs = (("0", "1"), ("1", "2"), ("false", "true"), ("no", "yes"), *((a, b) for a, b, *_ in SEQUENCES))
    first, second, *_ = next((pair for pair in pairs if said <= {*pair}), (*sorted(said), "OTHER", "OTHER"))
    return first, second


def _by_place(said: set[str], places: Names) -> list[str]:
    """The labels in the order of the columns, where each names its column by the word that tells it from the others.

    >>> _by_place({"model_b"}, ("a", "b")), _by_place({"0", "1"}, ("a", "b"))
    (['model_a', 'model_b'], [])
    >>> _by_place({"a is better", "a is much better", "b is better"}, ("a", "b"))
    ['a is better|a is much better', 'b is better']
    """
    # of a number only the place itself is a word: 1.98 is no "1", and neither is -1
    named = [sorted(w for w in said if place == w or (place in words_in(w) and not is_numeric(w))) for place in places]
    if not said or sorted(itertools.chain(*named)) != sorted(said) or any("," in w or "|" in w for w in said):
        return []
    at = next(i for i, words in enumerate(named) if words)
    there = re.compile(rf"(?<![a-z0-9]){places[at]}(?![a-z0-9])")
    return [
        "|".join(words or [there.sub(place, w) for w in named[at]]) for place, words in zip(places, named, strict=True)
    ]


def _compared(said: set[str], places: Names) -> list[str]:
    """The labels in the order of two columns, where each compares their places.

    >>> _compared({"a>b", "b>>a"}, ("a", "b")), _compared({"a>c"}, ("a", "b"))
    (['a>b|a>>b', 'b>a|b>>a'], [])
    """
    if len(places) != 2:
        return []
    one, two = places
    better = {f"{one}>": one, f"{two}<": one, f"{two}>": two, f"{one}<": two}
    words = {place: {f"{place}>{other}": None, f"{place}>>{other}": None} for place, other in ((one, two), (two, one))}
    for label in sorted(said):
        found = _COMPARISON.fullmatch(label)
        if found is None or {found[1], found[3]} != {one, two}:
            return []
        words[better[found[1] + found[2][0]]][label] = None
    return ["|".join(words[place]) for place in places] if said else []


def _start(rows: Rows, name: str, listed: str) -> str:
    """Whether the number of the best response in a list counts from 0 or from 1."""
    said = [int(float(r[name])) for r in rows if is_numeric(r.get(name))]
    counts = [len(v) for r in rows if isinstance(v := lookup(r, listed), list)]
    if 0 in said:
        return FROM_0
    if said and any(s >= n for s, n in zip(said, counts, strict=False)):
        return FROM_1
    raise two_readings(
        f"'{name}' counts the responses from 0",
        "it counts them from 1",
        f"--columns responses={listed} winner={name} order='{FROM_0}' or order='{FROM_1}' (with prompt=...)",
    )


def score_or_rank(rows: Rows, first: str, *more: str) -> str:
    """Whether numbers say how good (scores) or which place (ranks); by their name, and ranks by their values too."""
    names = (first, *more)
    parts = {*words_in(first.split(".")[-1])}
    cells = [[lookup(r, n) for n in names] if len(names) > 1 else decoded(lookup(r, first)) for r in rows]
    values = [v for cell in cells for v in (cell if isinstance(cell, list) else [cell]) if v is not None]
    places = all(float(v).is_integer() and float(v) >= 0 for v in values if is_numeric(v))
    if parts & RANK and (parts & SCORE or not places):
        raise two_readings(
            f"'{first}' is a rank (the lower, the better)",
            "it is a score (the higher, the better)",
            f"--columns ranks={','.join(names)} ... or scores={','.join(names)} ...",
        )
    return "ranks" if parts & RANK else "scores"


def contradicting(rows: Rows, responses: list[str], fitting: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first way to say which response is better, and those that contradict it in some row."""
    return [words for i, words in enumerate(fitting) if i == 0 or not _agree(rows, responses, fitting[0], words)]


def _agree(rows: Rows, responses: list[str], first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two ways never prefer responses the other way round."""
    one, two = (from_words({"responses": responses, **words}, "columns") for words in (first, second))
    for row in rows:
        try:
            a, b = (canonical_rows(s, row)[0][1]["scores"] for s in (one, two))
        except DataError:
            continue
        if any((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in itertools.combinations(range(len(a)), 2)):
            return False
    return True


def require_agreement(rows: Rows, columns: Sequence[str], sides: tuple[str, str]) -> None:
    """A column that says that the rejected response won contradicts the names of the columns.

    Raises:
      DataError: names both readings.
    """
    for name in (n for n in columns if n not in sides and WINNER & {*words_in(n)}):
        if any(isinstance(r.get(name), str) and word(r[name]) == sides[1].lower() for r in rows):
            raise two_readings(
                f"{sides[0]} is better by its name",
                f"'{name}' says {sides[1]} in some rows",
                f"--columns responses={sides[0]},{sides[1]} winner={name} order={sides[0]},{sides[1]} (with "
                f"prompt=...), or --columns chosen={sides[0]} rejected={sides[1]} ...",
            )
