"""How the numbers of a page came to be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ches_jax.errors import RunError
from ches_jax.report.document import Section
from ches_jax.report.html import data_table, paragraphs
from ches_jax.runs.directory import CONFIG, RUN
from ches_jax.runs.files import read_json
from ches_jax.runs.shapes import require_shape
from ches_jax.runs.store import is_there

_RATE = {"refusal_rate?": float, "interval?": [float], "responses?": int}
_SHAPE = {
    "config?": {"model?": str, "pairs?": str, "loss?": str, "tolerance?": float, "limit?": int, "columns?": {str: str}},
    "counts?": {"dropped?": int}, "summary?": {**_RATE, "by_category?": {str: _RATE}}, "status?": str,
    "work?": {
        **dict.fromkeys(("positions?", "shared_positions?", "programs?", "programs_from_cache?"), int),
        "padding?": float, "seconds?": {str: float},
    },
}  # fmt: skip
"""What a page reads of a record; the rest is shown as it is."""
_WHERE = ("model_fingerprint", "tokenizer_fingerprint", "data_fingerprint", "versions", "command", "device")


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json`` of a directory with its ``config``; empty without one, or where it is no JSON.

    Raises:
      RunError: something in it is not what this program writes there.
    """
    record = _object(folder / RUN)
    if not record.get("config"):
        record |= {"config": _object(folder / CONFIG).get("config") or {}}
    return record


def _object(path: Path) -> dict[str, Any]:
    if not is_there(path):
        return {}
    value = read_json(path, RunError, "a run directory")
    return require_shape(path, value, _SHAPE, RunError)


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested JSON as dotted names with values.

    >>> flat({"a": {"b": 1, "c": None}})
    [('a.b', '1')]
    """
    if value is None or value == {} or value == []:
        return []
    if isinstance(value, Mapping):
        return [row for k, v in value.items() for row in flat(v, f"{name}.{k}" if name else str(k))]
    text = value if isinstance(value, str) else str(value)
    return [(name, text if len(text) <= 300 else text[:297] + "...")]


def cost_words(work: Mapping[str, Any]) -> str:
    """What a run cost, from the ``work`` of its record; empty where it has none.

    >>> seconds = {"compiling": 1.5, "device": 2, "host": 0.25}
    >>> cost_words({"positions": 4096, "padding": 0.125, "shared_positions": 1200, "programs": 1, "seconds": seconds})
    'Cost: 4,096 positions computed, 12.5 % of them padding; 1,200 more were shared; 1 program; 1.5 seconds \
compiling, 2 device, 0.25 host.'
    """
    words = []
    if (positions := work.get("positions")) is not None:
        words.append(f"{positions:,} positions computed, {100 * work.get('padding', 0.0):.1f} % of them padding")
        words.append(f"{work.get('shared_positions', 0):,} more were shared")
    if (programs := work.get("programs")) is not None:
        cached = work.get("programs_from_cache")
        words.append(
            f"{programs:,} program{'s' * (programs != 1)}" + (f", {cached:,} of them from the cache" if cached else "")
        )
    if seconds := work.get("seconds"):
        first, *others = seconds.items()
        words.append(", ".join([f"{first[1]:g} seconds {first[0]}", *(f"{value:g} {name}" for name, value in others)]))
    return f"Cost: {'; '.join(words)}." if words else ""


def provenance(*records: Mapping[str, Any]) -> Section:
    """What the first record's run cost, and a folded table of everything that records tell, each name once."""
    rows: dict[str, str] = {}
    for record in records:
        for name, text in flat(record):
            rows.setdefault(name, text)
    cost = cost_words(records[0].get("work") or {}) if records else ""
    body = (paragraphs(cost) if cost else "") + data_table(["what", "value"], [*rows.items()][:300], text_columns=2)
    return Section(anchor="provenance", heading="Provenance", body=body, folded=True)


def model_name(record: Mapping[str, Any]) -> str:
    """The model of a run in few words: the last parts of its path."""
    return short_path((record.get("config") or {}).get("model"))


def short_path(spec: Any) -> str:
    """The last two parts of a path or a hub name.

    >>> short_path("/a/b/hh-tiny/fp32"), short_path("bundled"), short_path(None)
    ('hh-tiny/fp32', 'bundled', '')
    """
    return "/".join(Path(str(spec)).parts[-2:]) if spec else ""
