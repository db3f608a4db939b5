"""Options that several verbs share, and option types of the command line that need a reader of their own.

Plain data: importing this module loads no jax.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from numbers import Integral, Real
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from ches_jax.bundled import BUNDLED
from ches_jax.errors import ChesError, did_you_mean
from ches_jax.runs.store import is_store, place
from ches_jax.types import Eos, Pairing, Template


def not_identity(default: Any) -> Any:
    """A field that says where and by whom: two runs may differ in it and be the same run (``runs.directory.as_dict``).

    >>> @dataclass
    ... class Config:
    ...     limit: int = 4
    ...     mesh: str | None = not_identity(None)
    >>> Config().mesh is None
    True
    """
    return field(default=default, metadata={"identity": False})


DTYPES = ("float32", "bfloat16", "float16", "float64")


def require_dtype(option: str, dtype: str | None) -> None:
    """Refuses a dtype that is not one of ``DTYPES``; ``None`` is a default.

    >>> require_dtype("dtype", "int8")
    Traceback (most recent call last):
    ches_jax.errors.ChesError: --dtype 'int8': expected one of float32, bfloat16, float16, float64
    """
    if dtype is not None and dtype not in DTYPES:
        raise ChesError(f"--{option} {dtype!r}: expected one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")


def require_positive(numbers: dict[str, Any]) -> None:
    """Refuses the first number (by its option's name) that is not positive; ``None`` is a default.

    >>> require_positive({"limit": None, "batch-size": 0})
    Traceback (most recent call last):
    ches_jax.errors.ChesError: --batch-size 0: expected a positive number
    """
    for option, value in numbers.items():
        if value is not None and not value > 0:
            raise ChesError(f"--{option} {value}: expected a positive number")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every config is: its fields are checked where the config is made, whoever makes it.

    A path may be a ``Path`` where the command line takes a text, a number one of numpy.

    >>> from ches_jax import TrainConfig
    >>> TrainConfig(schedule="cosin")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ches_jax.errors.ChesError: TrainConfig: schedule is one of constant, linear, cosine, not 'cosin'; did you mean ...
    >>> TrainConfig(pairs=Path("pairs.jsonl")).pairs
    'pairs.jsonl'
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            given = getattr(self, name)
            value = plain(given, hint)
            if value is not given:
                object.__setattr__(self, name, value)
            if _fits(value, hint):
                continue
            words = [str(w) for w in _words(hint)]
            expected, shown = f"one of {', '.join(words)}" if words else _in_words(hint), f"{given!r}"
            if not isinstance(given, str | int | float | None) or len(shown) > 60:
                shown = f"a {type(given).__name__}"
            advice = did_you_mean(str(value), words) if words else _ROWS.get(name, "") if given is not None else ""
            raise ChesError(f"{type(self).__name__}: {name} is {expected}, not {shown}{advice}")


_ROWS: dict[str, str] = dict.fromkeys(  # pyright: ignore[reportAssignmentType]
    ("pairs", "prompts", "probes", "eval_pairs", "groups"),
    "; rows in memory go into a file first (ches_jax.score_pairs scores them as they are)",
)
"""Fields that name data, and what to do with data that have no name."""


@cache
def _hints(config: type[Options]) -> dict[str, Any]:
    return get_type_hints(config)


def _words(hint: Any) -> list[Any]:
    """All words that a type names, in unions and tuples too."""
    inside = [word for part in get_args(hint) for word in _words(part)] if get_origin(hint) is not Literal else []
    return list(get_args(hint)) if get_origin(hint) is Literal else inside


def plain(value: Any, hint: Any) -> Any:
    """The value as the annotated type has it, where it is the same thing in other clothes; else as it is.

    >>> import numpy as np
    >>> plain(np.int64(8), int), plain(1e3, int | None), plain(Path("a/b"), str | None)
    (8, 1000, 'a/b')
    """
    parts = _parts(hint)
    if _is_scalar(value):
        value = value.item()
    if isinstance(value, PurePath) and str in parts:
        return str(value)
    if type(value) is float and value.is_integer() and int in parts and float not in parts:
        return int(value)
    if type(value) is dict and any(map(_is_scalar, value.values())):
        return {k: v.item() if _is_scalar(v) else v for k, v in value.items()}
    return value


def _is_scalar(value: Any) -> bool:
    """Whether it is one number of numpy, jax or torch; none of them is imported for it."""
    return getattr(value, "ndim", None) == 0 and hasattr(value, "item")


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type, as far as the annotation decides it.

    >>> [_fits(v, Literal["auto"] | int | None) for v in (3, "auto", None, "autos", 2.5, True)]
    [True, True, True, False, False, False]
    >>> _fits(["a", "c"], tuple[Literal["a", "b"], ...]), _fits("ab", tuple[str, ...])
    (False, False)
    """
    kind, inside = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(value == word and type(value) is type(word) for word in inside)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in inside)
    if kind is tuple:
        return isinstance(value, tuple | list) and all(_fits(v, inside[0]) for v in value)
    if kind is dict:
        return isinstance(value, Mapping) and all(_fits(v, inside[1]) for v in value.values())
    if hint is Path:
        return isinstance(value, str | PurePath) or is_store(value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, NoneType) else True


def _in_words(hint: Any) -> str:
    """A type for people.

    >>> _in_words(int | None), _in_words(dict[str, float]), _in_words(tuple[str, ...])
    ('a whole number or None', 'a dict of names and numbers', 'a list of texts')
    """
    if get_origin(hint) is dict:
        return {float: "a dict of names and numbers", str: "a dict of names and texts"}.get(get_args(hint)[1], "a dict")
    if get_origin(hint) is tuple:
        return "a list of texts"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", Path: "a path"}
    return " or ".join(words.get(part, "None") for part in _parts(hint))


def _renamed(words: list[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for word, (ours, equals, _) in zip(words, pairs, strict=True):
        if not (ours and equals):
            raise ChesError(
                f"--columns {word!r}: expected ours=theirs, such as prompt=instruction (prompt= hides the column)"
            )
    return {ours: theirs for ours, _, theirs in pairs}


def _numbers(words: list[str]) -> dict[str, float]:
    values = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            values[name] = float(number)
        except ValueError:
            raise ChesError(f"{word!r}: expected name=number, such as beta=0.1") from None
    return values


def _values(words: list[str]) -> dict[str, Any]:
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ChesError(f"--template-args {word!r}: expected name=value, such as enable_thinking=false")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def _mapping(metavar: str, read: Any) -> PrimitiveConstructorSpec[Any]:
    """Words ``name=value`` as a dict."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={word}" for name, word in value.items()],
    )


Place = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: place(words[0]),
        is_instance=lambda value: isinstance(value, Path) or is_store(value),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A path, or an address in a store: ``runs/a``, ``gs://bucket/runs/a``."""
Columns = Annotated[dict[str, str], _mapping("OURS=THEIRS", _renamed)]
"""Other names of columns: ``--columns prompt=instruction chosen=answer_1``."""
TemplateArgs = Annotated[dict[str, Any], _mapping("NAME=VALUE", _values)]
"""Variables by name, their values JSON or text: ``--template-args enable_thinking=false``."""
Numbers = Annotated[dict[str, float], _mapping("NAME=NUMBER", _numbers)]
"""Hyper-parameters by name: ``--loss-args beta=0.1``."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The model, and the text it reads."""

    model: str = BUNDLED
    """Hugging Face model directory or hub name; default: the bundled model."""
    template: Template = "auto"
    """Chat template: auto (conversations only), always, none; or the name of one of several, or a Jinja file."""
    template_args: TemplateArgs = field(default_factory=dict)
    """Variables of the chat template: enable_thinking=false; now=2024-07-26 stops its clock."""
    max_length: int | None = None
    """Most tokens of prompt and response together; default: the model's context."""


@dataclass(frozen=True, kw_only=True)
class RowOptions(Options):
    """Which rows of a data set, under which names of columns."""

    split: str | None = None
    """Split of a data set folder or hub data set."""
    columns: Columns = field(default_factory=dict)
    """Other names of columns: prompt=instruction. A dot reaches into objects: responses=completions.response. Or the
    words of a schema: responses=answer_a,answer_b winner=label order=A,B (docs/data.md)."""
    limit: int | None = None
    """Only the first rows."""


@dataclass(frozen=True, kw_only=True)
class PairOptions(RowOptions):
    """Which preference pairs."""

    pairs: str = BUNDLED
    """File (JSONL, JSON, Parquet, Arrow, CSV; compressed or not), several with commas or a pattern, folder, address
    (https, hf, s3, gs) or hub name; default: the bundled pairs."""
    schema: str = "auto"
    """What the columns mean: auto (recognised and reported), a preset by name, a JSON or TOML file (docs/data.md)."""
    candidates: Pairing | None = None
    """Pairs of rows with several `responses`: chosen-against-all (the default: the one that `chosen` numbers, with the
    highest of `scores`, or else the first) or all-pairs (every better one against every worse one)."""
    eos: Eos = "include"
    """Whether the terminator of a response counts in |y|. include: a response that nothing ends gets one; given: only
    where the row has it (responses that a sampler cut have none)."""
