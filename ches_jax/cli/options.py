"""The options of a verb, read off its dataclass: name, kind of value, default, group; and their help texts."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from ches_jax.options import Columns

GROUPS = {
    "model": "model template template_args max_length adapter dtype param_dtype judge judge_template wrap reference "
    "reference_cache lora_rank lora_alpha lora_targets lora_rslora convert.run_dir step",
    "data": "pairs prompts responses scores run_dir split columns schema candidates limit eval_pairs holdout eos "
    "on_bad_row path before after diagnose.logps diagnose.scores responses_before "
    "responses_after judgments diagnose.generate labels label_columns on_missing weights train.rewards probes against"
    " plan.pairs pair_tokens",
    "where it runs": "topology slices rows arithmetic "
    "mesh distributed attention compilation_cache batch_tokens chunk_rows row_tokens remat "
    "generate.batch_size judge.batch_size",
    "output": "out resume other_versions quiet json tracker save_every train.keep keep_best export show list shard_gb "
    "convert.dtype",
}
"""Group -> its options (of all verbs, or of the named one); the rest say what is computed."""
POSITIONAL = get_args(tyro.conf.Positional[int])[1]
REPEATED = get_args(tyro.conf.UseAppendAction[int])[1]
COMPUTED = "what is computed"
ORDER = ("model", "data", COMPUTED, "where it runs", "output")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a verb."""

    field: str
    name: str
    """As it is typed, without the dashes: ``max-length``."""
    default: Any
    required: bool
    positional: bool
    switch: bool
    """Takes no value: ``--name`` or ``--no-name``."""
    repeats: bool
    """Written once for each of its values: ``--tracker wandb --tracker tensorboard``."""
    choices: tuple[str, ...]
    """The values it takes, where they are a closed list."""
    metavar: str
    group: str

    @property
    def many(self) -> bool:
        """Takes any number of values."""
        return self.metavar.endswith("...") or "=" in self.metavar

    @property
    def flags(self) -> tuple[str, ...]:
        """As they are typed."""
        if self.positional:
            return ()
        return (f"--{self.name}", f"--no-{self.name}") if self.switch else (f"--{self.name}",)


@cache
def options_of(verb: str, command: type[Any]) -> tuple[Option, ...]:
    """Every option of a verb, in the order of the groups."""
    hints = get_type_hints(command, include_extras=True)
    options = [_option(verb, f, hints[f.name]) for f in dataclasses.fields(command)]
    return tuple(sorted(options, key=_place))


def _option(verb: str, field: Any, hint: Any) -> Option:
    name, positional, repeats = field.name, False, False
    if get_origin(hint) is Annotated:
        positional, repeats = POSITIONAL in hint.__metadata__, REPEATED in hint.__metadata__
        if hint == Columns or any("Primitive" in type(extra).__name__ for extra in hint.__metadata__):
            metavar = next(x.metavar for x in hint.__metadata__ if hasattr(x, "metavar") and x.metavar)
            hint = Annotated[str, metavar]
        name = next((x.name for x in hint.__metadata__ if getattr(x, "name", None) and "Arg" in type(x).__name__), name)
    metavar, choices = _values(hint)
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    return Option(
        field=field.name,
        name=name.replace("_", "-"),
        default=None if required or field.default is dataclasses.MISSING else field.default,
        required=required,
        positional=positional,
        switch=hint is bool,
        repeats=repeats,
        choices=choices,
        metavar=metavar,
        group=_group(verb, field.name),
    )


def _values(hint: Any) -> tuple[str, tuple[str, ...]]:
    """How a value is written in help, and its closed list where it has one."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = hint.__metadata__[0]
        return (inner, ()) if isinstance(inner, str) else _values(arguments[0])
    if origin in (Union, UnionType):
        kinds = [_values(kind) for kind in arguments if kind is not type(None)]
        closed = all(choices for _, choices in kinds)
        return "|".join(kind for kind, _ in kinds), tuple(c for _, cs in kinds for c in cs) if closed else ()
    if origin is Literal:
        words = tuple(str(word) for word in arguments)
        return "|".join(words), words
    if origin is tuple:
        metavar, choices = _values(arguments[0])
        return f"{metavar} ...", choices
    return {int: "INT", float: "FLOAT", Path: "PATH"}.get(hint, "TEXT"), ()


def _group(verb: str, field: str) -> str:
    for wanted in (f"{verb}.{field}", field):
        for group, fields in GROUPS.items():
            if wanted in fields.split():
                return group
    return COMPUTED


def _place(option: Option) -> tuple[int, int]:
    listed = [field.rpartition(".")[2] for field in GROUPS.get(option.group, "").split()]
    return ORDER.index(option.group), listed.index(option.field) if option.field in listed else 0


def help_texts(command: type[Any]) -> dict[str, str]:
    """Field -> its help: the string below it in the source, of the class and those it inherits from.

    Apart from ``options_of``, since every command needs its options, and only help has use for reading the source.
    """
    texts: dict[str, str] = {}
    for kind in reversed([k for k in command.__mro__ if dataclasses.is_dataclass(k)]):
        texts |= dict(_class_texts(kind))
    return texts


def _class_texts(kind: type) -> Iterator[tuple[str, str]]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, after in zip(body.body, body.body[1:], strict=False):
        named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield node.target.id, " ".join(str(after.value.value).split())  # type: ignore[union-attr]
