"""Arithmetic over columns of numbers, ``--by column:EXPRESSION``: read as Python's syntax, computed by us, never run.

Names are columns (a dot reaches into objects), numbers are numbers; ``+ - * / < <= > >= == !=``, brackets, ``abs``,
``log`` (natural), ``min`` and ``max`` of two or more. A comparison gives 1 or 0. What is not a number (a missing value,
the logarithm of zero, a division by zero) makes the row unscored.
"""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from ches_jax.errors import RunError, did_you_mean

LONGEST = 1000
"""Characters; a longer expression is no formula."""
GRAMMAR = "columns, numbers, + - * / and comparisons, abs(), log(), min(), max(), brackets"
_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ONE: dict[str, Callable[[Any], Any]] = {"abs": np.abs, "log": np.log}
_SEVERAL: dict[str, Callable[[Any, Any], Any]] = {"min": np.minimum, "max": np.maximum}


def parsed(text: str) -> ast.expr:
    """The expression as a tree of what is allowed.

    Raises:
      RunError: anything else, shown where it stands.
    """
    if len(text) > LONGEST:
        raise RunError(f"--by column: an expression of {len(text)} characters; expected at most {LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _require_allowed(tree, text)
    except (SyntaxError, ValueError) as e:
        raise RunError(f"--by column:{text}: not an expression ({e}); expected {GRAMMAR}") from None
    except (RecursionError, MemoryError):
        raise RunError(f"--by column:{text[:60]} ...: too deep; expected {GRAMMAR}") from None
    return tree


def _require_allowed(node: ast.AST, text: str) -> None:
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            parts: Sequence[ast.AST] = (left, right)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            parts = (operand,)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
            parts = (left, *others)
        case ast.Call(func=ast.Name(id=name), args=[one], keywords=[]) if name in _ONE:
            parts = (one,)
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as several, keywords=[]) if name in _SEVERAL:
            parts = several
        case ast.Constant(value=bool()):
            raise ValueError("True and False are no numbers")
        case ast.Constant(value=int(value)) if abs(value) > 2**1000:
            raise ValueError("a number beyond all scores")
        case ast.Constant(value=int() | float()) | ast.Name():
            parts = ()
        case ast.Attribute() if _dotted(node) is not None:
            parts = ()
        case _:
            raise ValueError(f"{ast.get_source_segment(text.strip(), node) or type(node).__name__!r} is not allowed")
    for part in parts:
        _require_allowed(part, text)


def _dotted(node: ast.AST) -> str | None:
    """``meta.score`` of nested attributes of a name."""
    if isinstance(node, ast.Name):
        return node.id
    inner = _dotted(node.value) if isinstance(node, ast.Attribute) else None
    return None if inner is None or not isinstance(node, ast.Attribute) else f"{inner}.{node.attr}"


def names(tree: ast.expr) -> list[str]:
    """The columns that an expression reads, in order.

    >>> names(parsed("abs(a - b.c) + a"))
    ['a', 'b.c']
    """
    if (name := _dotted(tree)) is not None:
        return [name]
    parts = tree.args if isinstance(tree, ast.Call) else ast.iter_child_nodes(tree)
    return list(dict.fromkeys(n for part in parts if isinstance(part, ast.expr) for n in names(part)))


def evaluated(tree: ast.expr, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The value of an expression for every row, float64; NaN where it has none.

    >>> evaluated(parsed("max(a, 2) > 2 * b"), {"a": np.array([1.0, 5.0, np.nan]), "b": np.array([1.0, 2.0, 0.0])})
    array([ 0.,  1., nan])
    """
    rows = len(next(iter(columns.values())))
    with np.errstate(all="ignore"):
        values = np.broadcast_to(np.asarray(_value(tree, columns), np.float64), (rows,)).copy()
    return np.where(np.isfinite(values), values, np.nan)


def _value(node: ast.AST, columns: Mapping[str, np.ndarray]) -> Any:
    if (name := _dotted(node)) is not None:
        return columns[name]
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_value(left, columns), _value(right, columns))
        case ast.UnaryOp(op=op, operand=operand):
            return _value(operand, columns) * (-1.0 if isinstance(op, ast.USub) else 1.0)
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [np.asarray(_value(part, columns), np.float64) for part in (left, *others)]
            holds = [_COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, sides[:-1], sides[1:], strict=True)]
            known = reduce(np.logical_and, (~np.isnan(side) for side in sides))
            return np.where(known, reduce(np.logical_and, holds), np.nan)
        case ast.Call(func=ast.Name(id=name), args=args):
            values = [_value(part, columns) for part in args]
            return _ONE[name](values[0]) if name in _ONE else reduce(_SEVERAL[name], values)
        case ast.Constant(value=value):
            return np.float64(value)  # type: ignore[arg-type]  # checked to be a number
    raise AssertionError(f"not checked before: {ast.dump(node)}")


def as_numbers(name: str, values: Sequence[Any], known: Sequence[str]) -> np.ndarray:
    """A column of the data as float64: missing values are NaN, truth values 1 and 0, numbers as text are read.

    Raises:
      RunError: no row has the column, or one holds something else; names it.
    """
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if value is None or value == "":
            continue
        try:
            if not isinstance(value, int | float | str):
                raise ValueError
            out[i] = float(value)
        except (ValueError, OverflowError):
            raise RunError(
                f"--by column: {name!r} holds {value!r:.40} in row {i}; expected a column of numbers"
            ) from None
    if all(value is None for value in values):
        there = ", ".join(sorted(known)[:30])
        raise RunError(f"--by column: no column {name!r}{did_you_mean(name, list(known))} (there are {there})")
    return out
