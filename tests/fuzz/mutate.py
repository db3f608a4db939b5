"""Small damage to valid things: bytes of a file, values of a JSON document, columns of a table, letters of a text."""

import contextlib
import copy
import json
from random import Random
from typing import Any

import pyarrow as pa

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    2**31,
    -(2**63),
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "a",
    "0",
    "1.5",
    "nan",
    "model_a",
    "tie",
    "\x1b[2J",
    "\u202e",
    "\x00",
    "\ud800",
    "日本",
    "a" * 5000,
    "../../x",
    "/dev/zero",
    "[",
    "{}",
    '{"a": 1}',
    '[{"role": "user", "content": "x"}]',
    [],
    {},
    [None],
    [[]],
    [1, "a", None],
    {"": 0},
    {"a": {"a": {}}},
    {"role": "user"},
    [{"role": "user", "content": None}],
    ["a"] * 50,
    {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
    {"role": ["user"], "content": {}},
]


def odd(rng: Random) -> Any:
    """A value that nobody expects."""
    if rng.random() < 0.03:
        deep: Any = rng.choice(ODD)
        for _ in range(rng.choice([5, 50, 800])):
            deep = {"a": deep} if rng.random() < 0.5 else [deep]
        return deep
    return copy.deepcopy(rng.choice(ODD))


def in_bytes(rng: Random, data: bytes) -> bytes:
    """One to eight pieces of damage."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(out) + 1)
        span = rng.choice([1, 2, 4, 8, 40])
        match rng.randrange(8):
            case 0 | 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 3:
                del out[at:]
            case 4:
                del out[at : at + span]
            case 5:
                out[at:at] = rng.randbytes(span)
            case 6:
                out[at:at] = out[max(0, at - span) : at]
            case _:
                out[at : at + span] = bytes([rng.choice([0, 255, 127, 34, 91, 123])]) * span
    return bytes(out)


def in_text(rng: Random, text: str, words: list[str]) -> str:
    """A text with pieces cut, doubled, or taken from ``words``."""
    out = text
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, to = sorted(rng.randrange(len(out) + 1) for _ in range(2))
        match rng.randrange(4):
            case 0:
                out = out[:at] + out[min(to, at + 12) :]
            case 1:
                out = out[:at] + rng.choice(words) + out[at:]
            case 2:
                out = out[:at] + rng.choice(words) + out[min(to, at + 6) :]
            case _:
                out = out[:to] + out[at:to] + out[to:]
    return out


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found.append((value, key))
        if len(found) < 2000:
            _places(inner, found)
    return found


def in_value(rng: Random, value: Any, words: tuple[str, ...] = ()) -> Any:
    """A JSON value with one to three things changed; ``words`` are names and values that the reader knows."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = _places(root, [])
        holder, key = rng.choice(places)
        new = rng.choice(words) if words and rng.random() < 0.3 else odd(rng)
        match rng.randrange(6):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice([*words, "x", ""]) if rng.random() < 0.8 else str(new)[:20]] = holder[key]
            case 2 if isinstance(holder, list) and holder is not root:
                holder.insert(key, new)
            case 3:
                other, name = rng.choice(places)
                with contextlib.suppress(RecursionError):
                    holder[key] = copy.deepcopy(other[name])
            case 4 if isinstance(holder[key], str):
                holder[key] = in_text(rng, holder[key], [*words, "\n", '"', "<|user|>", "}}", "%s"])[:10_000]
            case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = rng.choice([-1, 2, 10**9]) * holder[key]
            case _:
                holder[key] = new
    return root[0]


def as_json(rng: Random, value: Any) -> bytes:
    """Its text; now and then damaged, with numbers that JSON has not or keys twice."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except RecursionError:
        text = b"[" * 2000 + b"]" * 2000
    return in_bytes(rng, text) if text and rng.random() < 0.2 else text


def in_table(rng: Random, table: pa.Table) -> pa.Table:
    """A table with columns dropped, renamed, of another type, or with values changed."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not table.num_columns:
            return table
        at = rng.randrange(table.num_columns)
        name, column = table.column_names[at], table.column(at).combine_chunks()
        match rng.randrange(7):
            case 0:
                table = table.remove_column(at)
            case 1:
                table = table.rename_columns(
                    [
                        n if i != at else rng.choice(["x", "", *table.column_names])
                        for i, n in enumerate(table.column_names)
                    ]
                )
            case 2:
                table = table.slice(0, rng.choice([0, 1, 2]))
            case 3:
                table = table.set_column(at, name, pa.nulls(table.num_rows))
            case 4:
                values = [str(v) for v in column.to_pylist()]
                table = table.set_column(at, name, pa.array([[v] for v in values] if rng.random() < 0.3 else values))
            case 5:
                values = column.to_pylist()
                for _ in range(min(2, len(values))):
                    values[rng.randrange(len(values))] = rng.choice(
                        [None, 0, -1, 2**40, -(2**63), float("nan"), float("inf"), 1e308, "", "x", "\x00"]
                    )
                try:
                    table = table.set_column(at, name, pa.array(values, column.type))
                except (pa.ArrowException, OverflowError, TypeError, ValueError):
                    table = table.set_column(at, name, pa.array([str(v) for v in values]))
            case _:
                table = pa.concat_tables([table, table]) if rng.random() < 0.5 else table.slice(0, 1)
    if rng.random() < 0.2:
        kept = dict(table.schema.metadata or {})
        for key in list(kept):
            kept[key] = in_bytes(rng, kept[key])
        table = table.replace_schema_metadata(kept or None)
    return table
