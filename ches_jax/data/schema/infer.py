"""What the columns of a data set say by their names and values. Where two readings are possible, both are named.

Rules, in this order; each is refused where its columns can be read in more than one way:

    chosen, rejected (or two names that say the same)   these
    two or more columns that differ by a or b, 0 or 1   the responses; with them one of
        a column that names one of them                 winner, preference, label, choice ...
        a column of 0 and 1 for each                    winner_a, winner_b
        a number for each                               score_a, score_b (higher), rank_a, rank_b (lower)
    a column with a list of responses                   with one of the same beside it or inside
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ches_jax.data.prompts import COLUMNS, lookup
from ches_jax.data.schema.presets import PRESETS
from ches_jax.data.schema.schema import TIE, Schema, word
from ches_jax.data.schema.values import is_conversation, is_number, is_text, normal, number
from ches_jax.errors import DataError

Rows = Sequence[Mapping[str, Any]]

PROMPTS = ("prompt", "instruction", "question", "query", "history", "context", "messages", "conversations",
           "conversation", "post", "user_prompt", "task", "problem", "input")  # fmt: skip
SYSTEMS = ("system", "system_prompt", "system_message")
_SIDES = (
    ("chosen", "rejected"), ("preferred", "rejected"), ("preferred", "dispreferred"), ("accepted", "rejected"),
    ("preferred", "nonpreferred"), ("positive", "negative"), ("winner", "loser"), ("winning", "losing"),
    ("win", "lose"), ("good", "bad"), ("better", "worse"), ("best", "worst"), ("w", "l"), ("pos", "neg"),
)  # fmt: skip
"""Words that tell the preferred response from the other."""
_MARKS = (tuple("abcdefgh"), tuple("012345678"), tuple("123456789"), ("left", "right"), ("first", "second"), ("x", "y"))
"""Words that tell responses apart and not which is preferred."""
_RESPONSE = re.compile(
    r"resp|answer|compl|output|repl|conversation|generation|candidate|text|summar|human_ref|continuation|assistant"
    r"|message|^$|comment|translation|option|essay|story",
    re.IGNORECASE,
)
_NOT_RESPONSE = re.compile(r"model|name|\bid\b|_id|source|author|lang|provider|system|prompt|tokens?$|url", re.IGNORECASE)
_WINNER = re.compile(r"winner|prefer|better|choice|label|vote|verdict|chosen|best|selected|judg", re.IGNORECASE)
_HIGHER = re.compile(r"score|rating|reward|helpful|quality|upvote|likes|overall|points|grade", re.IGNORECASE)
_LOWER = re.compile(r"rank|position|place", re.IGNORECASE)
_TIES = ("tie", "tie (bothbad)", "tie(bothbad)", "bothbad", "both_bad", "both", "neither", "equal", "same", "draw",
         "tied", "none", "no preference", "both bad", "both good")  # fmt: skip
_LISTS = ("responses", "completions", "answers", "replies", "candidates", "generations", "outputs", "summaries",
          "all_generated_responses", "options")  # fmt: skip
_TEXT_KEYS = ("response", "text", "answer", "content", "completion", "output", "reply", "summary", "generation")
_ONE = ("response", "completion", "output", "answer", "reply")
_HINTS = {
    "a prompt or a part of it": re.compile(r"^(instruction|question|query|context|input|history|passage|document)$", re.I),
    "a system text": re.compile(r"^(system|system_prompt|system_message)$", re.I),
    "a label or a rank": re.compile(r"^(label|labels|winner|preference|rank|ranks|swapped|flipped|is_flipped|tie)$", re.I),
}  # fmt: skip


def infer(rows: Rows) -> Schema | None:
    """How rows are meant, from a sample of them; None: as they are (``prompt, chosen, rejected`` and the like).

    Args:
      rows: a few hundred rows, as read.

    Raises:
      DataError: two readings are possible; both are named.

    >>> infer([{"q": "x"}]) is None, infer([{"question": "1+1?", "good": "2", "bad": "3"}]).describe()
    (True, 'prompt = question; chosen = good; rejected = bad')
    """
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    if preset := next((p for p in PRESETS if _fits(p, rows)), None):
        return preset
    if any(name.endswith("_ids") for name in names if name in COLUMNS):
        return None
    if sides := _sides(rows, names):
        return _with_prompt(rows, names, chosen=sides[0], rejected=sides[1])
    if family := _responses(rows, names):
        return _with_prompt(rows, names, responses=family, **_preference(rows, names, family))
    if listed := _listed(rows, names):
        return _with_prompt(rows, names, **listed)
    return _grouped(rows, names)


def infer_prompt(rows: Rows) -> Schema | None:
    """How the prompt of rows is meant; None: it stands in ``prompt``, or in a pair as it is."""
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    if preset := next((p for p in PRESETS if _fits(p, rows)), None):
        return preset
    if "prompt_ids" in names or {"chosen", "rejected"} <= set(names):
        return infer(rows) if "prompt_ids" not in names else None
    schema = _with_prompt(rows, names)
    return schema if schema and (schema.prompt or schema.system) else None


def hints(rows: Rows, schema: Schema | None) -> list[str]:
    """Columns that nothing reads and whose name says that something should."""
    read = set(COLUMNS)
    if schema is not None:
        read |= {*schema.ignore, *(name.partition(".")[0] for name in schema.columns())}
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    notes = []
    for name in names:
        values = [v for row in rows if (v := row.get(name)) not in (None, "")]
        for what, pattern in _HINTS.items():
            if name not in read and values and pattern.match(name) and not _repeats(rows, name):
                notes.append(f"column '{name}' looks like {what} and is not read (--columns or --schema would read it)")
    return notes


def _fits(preset: Schema, rows: Rows) -> bool:
    """Whether the rows have all columns of a preset, and its labels hold what they should."""
    some = [row for row in rows if all(lookup(row, name) is not None for name in preset.columns())]
    if 2 * len(some) <= len(rows):
        return False
    if preset.winner and not any(w in preset.winner_is for w in ("negative", "positive")):
        return all(word(lookup(row, preset.winner)) in preset.winner_is for row in some)
    return True


def _sides(rows: Rows, names: list[str]) -> tuple[str, str] | None:
    """The columns of the chosen and of the rejected response."""
    texts = [n for n in names if _mostly(rows, n, _is_side)]
    if "chosen" in texts and "rejected" in texts:
        return "chosen", "rejected"
    pairs = [
        (a, b) for a in texts for b in texts if a != b
        for x, y in _SIDES if (stem := _stem(a, x)) is not None and stem == _stem(b, y)
    ]  # fmt: skip
    pairs = list(dict.fromkeys(pairs))
    if len(pairs) > 1:
        raise _two_readings("the chosen and the rejected response", [" and ".join(p) for p in pairs], "chosen=NAME rejected=NAME")
    return pairs[0] if pairs else None


def _is_side(value: Any) -> bool:
    return is_text(value) or (isinstance(value, list) and bool(value) and all(is_text(v) for v in value))


def _with_prompt(rows: Rows, names: list[str], **rest: Any) -> Schema | None:
    """The schema with its prompt; None where the rows are already as ``prompts`` reads them."""
    used = {n.partition(".")[0] for v in rest.values() if isinstance(v, str | tuple)
            for n in ((v,) if isinstance(v, str) else v)}  # fmt: skip
    system = next((n for n in SYSTEMS if n in names and n not in used and _some(rows, n, str)), None)
    prompt = _prompt(rows, [n for n in names if n not in used], rest)
    plain = rest in ({}, {"chosen": "chosen", "rejected": "rejected"})
    if plain and system is None and prompt in ((), ("prompt",)) and not _needs_reading(rows):
        return None
    return Schema("columns", prompt=prompt, system=system, **rest)


def _prompt(rows: Rows, names: list[str], rest: Mapping[str, Any]) -> tuple[str, ...]:
    if "prompt" in names and any(row.get("prompt") is not None for row in rows):
        return ("prompt",)
    sides = [rest[k] for k in ("chosen", "rejected") if k in rest] or list(rest.get("responses", ()))
    if sides and all(_mostly(rows, s, lambda v: is_conversation(_parsed(v))) for s in sides):
        return ()  # whole conversations hold their prompt
    if sides and all(_mostly(rows, s, lambda v: isinstance(v, str) and "\n\nAssistant:" in v) for s in sides):
        return ()
    found = [n for n in PROMPTS if n in names and _mostly(rows, n, is_text)]
    found += [n for n in names if (n == "question" or n == "info") and n not in found and _inner(rows, n)]
    if "instruction" in found and "input" in found:
        return ("instruction", "input")
    if "input" in found and len(found) > 1:
        found.remove("input")
    if len(found) > 1:
        raise _two_readings("the prompt", found, "prompt=NAME")
    return tuple(_inner(rows, n) or n for n in found)


def _inner(rows: Rows, name: str) -> str | None:
    """The text inside a column of objects: ``question.full_text``."""
    for key in ("full_text", "text", "post", "content"):
        if _mostly(rows, f"{name}.{key}", lambda v: isinstance(v, str)):
            return f"{name}.{key}"
    return None


def _needs_reading(rows: Rows) -> bool:
    """Whether a cell of prompt, chosen or rejected is written in another way than ``prompts`` reads."""
    for row in rows:
        for name in ("prompt", "chosen", "rejected"):
            value = row.get(name)
            if value is not None and normal(value) != value:
                return True
            if name != "prompt" and isinstance(value, list) and value and not is_text(value) and all(map(is_text, value)):
                return True
    return False


def _responses(rows: Rows, names: list[str]) -> tuple[str, ...] | None:
    """Columns that hold one response each."""
    texts = [n for n in names if _mostly(rows, n, is_text) and not _mostly(rows, n, is_number)]
    families = _families(texts, lambda stem: bool(_RESPONSE.search(stem)) and not _NOT_RESPONSE.search(stem))
    families = [f for f in families if not _same_everywhere(rows, f)]
    if len(families) > 1:
        raise _two_readings("the responses", [" and ".join(f) for f in families], "responses=NAME,NAME")
    return families[0] if families else None


def _preference(rows: Rows, names: list[str], family: tuple[str, ...]) -> dict[str, Any]:
    """What says which of the responses is preferred."""
    marks = _marks_of(family)
    readings: list[tuple[str, dict[str, Any]]] = []
    one_hot = [
        f for f in _families([n for n in names if _mostly(rows, n, _is_flag)], lambda s: bool(_WINNER.search(s)))
        if len(f) == len(family)
    ]  # fmt: skip
    readings += [(" and ".join(f), {"one_hot": f}) for f in one_hot]
    flags = {n for f in one_hot for n in f}
    for name in names:
        if _WINNER.search(name) and name not in flags and name not in family and not re.search(r"tie|strength|text|reason", name):
            values = [row[name] for row in rows if row.get(name) is not None]
            if values and not all(isinstance(v, str) and len(v) > 80 for v in values) and not isinstance(values[0], list | dict):
                readings.append((name, _winner(rows, name, values, family, marks)))
    numbers = _families([n for n in names if _mostly(rows, n, is_number)], lambda s: bool(_HIGHER.search(s) or _LOWER.search(s)))
    numbers = [f for f in numbers if len(f) == len(family) and f not in one_hot]
    readings += [(" and ".join(f), _ordered(f)) for f in numbers]
    if len(readings) > 1 and not _agree(rows, family, [r for _, r in readings]):
        raise _two_readings("which response is preferred", [n for n, _ in readings], "winner=NAME or scores=NAME,NAME")
    if not readings:
        raise DataError(
            f"{' and '.join(family)} look like responses, and no column says which is preferred "
            f"(there are {', '.join(names)}); say which with --columns winner=NAME or scores=NAME,NAME, or with --schema FILE"
        )
    return readings[0][1]


def _ordered(family: tuple[str, ...]) -> dict[str, Any]:
    return {"ranks": family} if _LOWER.search(family[0]) else {"scores": family}


def _agree(rows: Rows, family: tuple[str, ...], readings: list[dict[str, Any]]) -> bool:
    """Whether several columns say the same in every row."""
    def told(row: Mapping[str, Any], reading: dict[str, Any]) -> int | None:
        try:
            content = Schema(responses=family, **reading).read(row)
        except DataError:
            return -1
        if "chosen" in content:
            return int(content["chosen"])
        scores = content["scores"]
        return scores.index(max(scores)) if scores.count(max(scores)) == 1 else None

    return all(len({told(row, reading) for reading in readings}) == 1 for row in rows)


def _winner(rows: Rows, name: str, values: list[Any], family: tuple[str, ...], marks: tuple[str, ...]) -> dict[str, Any]:
    """A column that names the preferred response; its values must name it in one way only."""
    words = {word(v) for v in values}
    models = tuple(f"model_{m}" for m in marks)
    if all(lookup(rows[0], m) is not None for m in models) and not words & {*models, *marks} and any(
        lookup(row, m) == row.get(name) for row in rows for m in models
    ):  # fmt: skip
        return {"winner": name, "winner_names": models, "winner_is": dict.fromkeys(_TIES, TIE)}
    if all(type(v) is bool for v in values):
        told = [i for i, m in enumerate(marks) if m in _pieces(name)]
        if len(told) == 1 and len(marks) == 2:
            return {"winner": name, "winner_is": {"true": told[0], "false": 1 - told[0]}}
        raise _two_ways(name, words, f"true means {family[0]}", f"true means {family[1]}")
    if all(is_number(v) for v in values):
        return {"winner": name, "winner_is": _numbered(name, words, family, marks)}
    known: dict[str, int | str] = dict.fromkeys(_TIES, TIE)
    for i, (mark, column) in enumerate(zip(marks, family, strict=True)):
        for spelled in (mark, column, *(f"{s}{sep}{mark}" for s in ("model", "response", "answer", "assistant", "completion", "output", "option") for sep in "_ -"), f"{mark} wins", f"{mark} is better"):
            known[spelled.lower()] = i
        if len(mark) == 1 and mark.isalpha():
            known[f"[[{mark}]]"] = i
    other = {w for w in words if w not in known}
    if other:
        raise DataError(
            f"column '{name}' says which of {' and '.join(family)} is preferred in words that are not known: "
            f"{', '.join(sorted(other)[:4])}; say what they mean with --schema FILE (winner_is)"
        )
    return {"winner": name, "winner_is": known}


def _numbered(name: str, words: set[str], family: tuple[str, ...], marks: tuple[str, ...]) -> dict[str, int | str]:
    count = len(family)
    if any(w.startswith("-") for w in words):
        raise _two_ways(name, words, f"below 0 {family[0]} is better", f"below 0 {family[1]} is better")
    if marks[0] in ("0", "1") and marks[0].isdigit():
        by_mark: dict[str, int | str] = {m: i for i, m in enumerate(marks)}
        if words <= by_mark.keys() and (marks[0] == "0" or words != {"1"}):
            return by_mark
        raise _two_ways(name, words, f"0 means {family[0]}, counted from 0", f"{marks[0]} means {family[0]}, as in the names of the columns")
    if words <= {str(i + 1) for i in range(count)} and "2" in words:
        return {str(i + 1): i for i in range(count)}
    raise _two_ways(name, words, f"1 means that {family[0]} is preferred", f"1 means {family[1]}, counted from 0")


def _listed(rows: Rows, names: list[str]) -> dict[str, Any] | None:
    """A column with a list of responses, and what orders them."""
    found = [n for n in _LISTS if n in names and _mostly(rows, n, lambda v: isinstance(v, list) and bool(v))]
    readings = []
    for name in found:
        path = name
        if not _mostly(rows, name, lambda v: isinstance(v, list) and all(map(is_text, v))):
            inside = [k for k in _TEXT_KEYS if _mostly(rows, f"{name}.{k}", _texts)]
            if len(inside) != 1:
                continue
            path = f"{name}.{inside[0]}"
        readings.append(path)
    if not readings:
        return None
    if len(readings) > 1:
        raise _two_readings("the responses", readings, "responses=NAME")
    path, head = readings[0], readings[0].partition(".")[0]
    inner = sorted({f"{head}.{k}" for row in rows for o in (row.get(head) or []) if isinstance(o, Mapping) for k in o})
    orders = [
        n for n in [*inner, *names]
        if n != path and (_HIGHER.search(n) or _LOWER.search(n)) and _mostly(rows, n, _numbers)
    ]  # fmt: skip
    choices = [n for n in names if _WINNER.search(n) and _mostly(rows, n, lambda v: type(v) is int and v >= 0)]
    if path == "responses" and not choices and orders in ([], ["scores"]):
        return None  # as ``prompts`` reads it
    if path == "responses" and choices == ["chosen"] and not orders:
        return None
    if len(orders) + len(choices) > 1:
        raise _two_readings("which response is preferred", [*orders, *choices], "scores=NAME or ranks=NAME")
    if orders:
        return {"responses": (path,), **_ordered((orders[0],))}
    if choices:
        count = max(len(lookup(row, path) or []) for row in rows)
        values = {word(row.get(choices[0])) for row in rows}
        if "0" not in values:
            raise _two_ways(choices[0], values, "it counts from 0", "it counts from 1")
        return {"responses": (path,), "winner": choices[0], "winner_is": {str(i): i for i in range(count)}}
    raise DataError(f"'{path}' holds responses, and no column says which is preferred; say which with --columns scores=NAME or ranks=NAME")


def _grouped(rows: Rows, names: list[str]) -> Schema | None:
    """Rows of one response that share a prompt with the row before, and have one score."""
    one = [n for n in _ONE if n in names and _mostly(rows, n, is_text)]
    scores = [n for n in names if (_HIGHER.search(n) or _LOWER.search(n)) and _mostly(rows, n, is_number)]
    if len(one) != 1 or not scores:
        return None
    prompt = _prompt(rows, [n for n in names if n != one[0]], {})
    if not prompt or not any(_same(a, b, prompt) for a, b in zip(rows, rows[1:], strict=False)):
        return None
    if len(scores) > 1:
        raise _two_readings("the score of a response", scores, "scores=NAME")
    return Schema("columns", prompt=prompt, responses=(one[0],), group=True, **_ordered((scores[0],)))


def _same(a: Mapping[str, Any], b: Mapping[str, Any], prompt: tuple[str, ...]) -> bool:
    return all(lookup(a, n) == lookup(b, n) for n in prompt)


def _pieces(name: str) -> list[str]:
    return [p.lower() for p in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]


def _stem(name: str, mark: str) -> str | None:
    """The name without the one piece that is ``mark``; None where it has not exactly one."""
    pieces = _pieces(name)
    return "_".join(p for p in pieces if p != mark) if pieces.count(mark) == 1 else None


def _families(names: list[str], wanted: Any) -> list[tuple[str, ...]]:
    """Columns that differ only in a mark (a and b, 0 and 1, left and right), by the stem they share."""
    families: dict[tuple[str, ...], tuple[str, ...]] = {}
    for marks in _MARKS:
        stems: dict[str, dict[str, str]] = {}
        for name in names:
            for mark in marks:
                stem = _stem(name, mark)
                if stem is not None and wanted(stem):
                    stems.setdefault(stem, {})[mark] = name
        for by_mark in stems.values():
            count = next((i for i, m in enumerate(marks) if m not in by_mark), len(marks))
            if count >= 2 and count == len(by_mark):
                family = tuple(by_mark[m] for m in marks[:count])
                families[tuple(sorted(family))] = family
    return list(families.values())


def _marks_of(family: tuple[str, ...]) -> tuple[str, ...]:
    for marks in _MARKS:
        some = marks[: len(family)]
        stems = {_stem(n, m) for n, m in zip(family, some, strict=False)}
        if len(some) == len(family) and len(stems) == 1 and None not in stems:
            return some
    return tuple(str(i) for i in range(len(family)))


def _mostly(rows: Rows, path: str, good: Any) -> bool:
    """Whether most values of a column that are there are so; False where there is none."""
    values = [v for row in rows if (v := lookup(row, path)) is not None]
    return bool(values) and 2 * sum(map(bool, map(good, values))) > len(values)


def _some(rows: Rows, name: str, kind: type) -> bool:
    return any(isinstance(row.get(name), kind) and row[name].strip() for row in rows)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_text(v) for v in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_number(v) and number(v) is not None for v in value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (is_number(value) and number(value) in (0.0, 1.0))


def _parsed(value: Any) -> Any:
    return normal(value)


def _same_everywhere(rows: Rows, family: tuple[str, ...]) -> bool:
    return all(len({repr(row.get(n)) for n in family}) == 1 for row in rows)


def _repeats(rows: Rows, name: str) -> bool:
    """Whether a column only says again what the prompt or the responses hold."""
    return all(str(row[name]) in str([row.get(n) for n in COLUMNS]) for row in rows if row.get(name) not in (None, ""))


def _two_readings(what: str, names: Sequence[str], remedy: str) -> DataError:
    return DataError(
        f"{what} could be read from {' or from '.join(repr(n) for n in names)}; say which with --columns {remedy} "
        "or with --schema FILE"
    )


def _two_ways(name: str, words: set[str], one: str, other: str) -> DataError:
    return DataError(
        f"column '{name}' ({', '.join(sorted(words)[:4])}) can be read in two ways: {one}, or {other}; say which with "
        "--schema FILE (winner_is)"
    )
