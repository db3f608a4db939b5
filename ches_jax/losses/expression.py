"""The loss as it is written: ``wpo(dpo(beta=0.1)) + 0.2*sft``.

    expression   term [+ term ...]
    term         part, WEIGHT*part or part*WEIGHT
    part         NAME, NAME(number or name=number, ...), WRAPPER(expression, name=number, ...) or (expression)

Names are those of ``loss_names`` and ``WRAPPERS``. What comes out shows every value, and reads back as itself:

>>> parse_loss("wpo(dpo) + 0.2*sft")
wpo(dpo(beta=0.1)) + 0.2*sft
>>> shown = repr(parse_loss("gate(dpo + 2*(ipo_sum + sft))"))
>>> repr(parse_loss(shown)) == shown
True

A list is TRL's ``loss_type``; its weights are 1:

>>> parse_loss('["sigmoid", "bco_pair", "sft"]')
sigmoid(beta=0.1) + bco_pair_unshifted(beta=0.1) + sft
"""

import ast
import math
from collections.abc import Mapping, Sequence

from ches_jax.errors import ChesError, did_you_mean
from ches_jax.losses.registry import Loss, get_loss, hyper_names, loss_names, unknown_name
from ches_jax.losses.wrappers import WRAPPERS, weighted_sum

LONGEST = 1000
"""Letters of an expression."""
DEEPEST = 16
"""Brackets within brackets."""
FROM_TRL = {
    "ipo": "ipo_mean",
    "nca_pair": "nca",
    "bco_pair": "bco_pair_unshifted",
    "sigmoid": "sigmoid",
    "hinge": "hinge",
    "exo_pair": "exo_pair",
    "robust": "robust",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sigmoid_norm": "sigmoid_norm",
    "sft": "sft",
}
"""Names of TRL 1.16's ``loss_type`` and ours; its one ``beta`` is ours of each loss (``tau`` of IPO)."""
TRL_BETA = 0.1


def parse_loss(text: str, hyper: Mapping[str, float] | None = None) -> Loss:
    """The loss of an expression.

    Args:
      text: the expression.
      hyper: hyper-parameters of an expression that is one bare name.

    Raises:
      ChesError: what is wrong with the expression, and where.
    """
    if not isinstance(text, str):
        raise ChesError(f"parse_loss: {text!r:.80} is no text; {EXPECTED}")
    if len(text) > LONGEST:
        raise ChesError(f"--loss: an expression of {len(text)} letters; at most {LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" at letter {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise ChesError(f"--loss {text!r}: not an expression{where}; {EXPECTED}") from None
    reader = _Reader(text)
    if isinstance(tree, ast.Name) and tree.id not in WRAPPERS:
        return get_loss(tree.id, **(hyper or {}))
    if hyper:
        given = ", ".join(f"{k}={v:g}" for k, v in hyper.items())
        raise ChesError(
            f"--loss {text!r} --loss-args {given}: in an expression numbers stand with their loss, NAME({given})"
        )
    return reader.loss(tree, 0)


EXPECTED = "expected losses with their numbers, wrappers and weights, such as wpo(dpo(beta=0.1)) + 0.2*sft"


FDPO = {"forward_kl": "fdpo_forward_kl", "js_divergence": "fdpo_js", "alpha_divergence": "fdpo_alpha"}
"""TRL's ``f_divergence_type`` of ``sigmoid``, and ours."""


def from_trl(
    loss_types: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    beta: float = TRL_BETA,
    label_smoothing: float = 0.0,
    *,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    discopop_tau: float = 0.05,
) -> Loss:
    """The loss of TRL's ``loss_type=[...]``, with its ``loss_weights=[...]`` (all 1 if absent) and numbers.

    Only ``exo_pair`` keeps a default of its own: TRL has none for it. ``ld_alpha`` makes a loss of tokens;
    ``f_divergence_type`` is for ``sigmoid``, alone or with ``sft``. TRL's ``use_weighting`` has no equal here: ``wpo``
    is the paper's form, without TRL's alignment of the weights.

    >>> from_trl(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    0.8*sigmoid(beta=0.1) + 0.2*bco_pair_unshifted(beta=0.1) + sft
    >>> from_trl("robust", label_smoothing=0.2)
    robust(beta=0.1, label_smoothing=0.2)
    >>> from_trl(["sigmoid", "sft"], ld_alpha=0.5)
    beyond_shared_length(sigmoid(beta=0.1), alpha=0.5) + sft

    Raises:
      ChesError: a name that TRL 1.16 does not have, another number of weights, a divergence that a loss does not have.
    """
    loss_types = [loss_types] if isinstance(loss_types, str) else list(loss_types)
    weights = [1.0] * len(loss_types) if loss_weights is None else loss_weights
    if len(weights) != len(loss_types):
        raise ChesError(f"loss_weights: {len(weights)} weights of {len(loss_types)} losses")
    if f_divergence_type not in ("reverse_kl", *FDPO):
        raise ChesError(
            f"f_divergence_type={f_divergence_type!r}: expected one of reverse_kl, {', '.join(FDPO)}"
            f"{did_you_mean(str(f_divergence_type), tuple(FDPO))}"
        )
    terms = []
    for weight, name in zip(weights, loss_types, strict=True):
        if name not in FROM_TRL:
            raise ChesError(unknown_name(str(name), sorted(FROM_TRL), "loss_type of TRL"))
        ours = FROM_TRL[name]
        if f_divergence_type != "reverse_kl" and name != "sft":
            if name != "sigmoid":
                raise ChesError(f"f_divergence_type={f_divergence_type!r}: of loss_type sigmoid here, not of {name}")
            ours = FDPO[f_divergence_type]
        numbers = {"tau" if name == "ipo" else "beta": beta, "alpha": f_alpha_divergence_coef}
        if label_smoothing or name != "exo_pair":
            numbers["label_smoothing"] = label_smoothing
        if name == "discopop":
            numbers["tau"] = discopop_tau
        loss = get_loss(ours, **{k: v for k, v in numbers.items() if k in hyper_names(ours)})
        if ld_alpha is not None and name != "sft":
            loss = WRAPPERS["beyond_shared_length"].make(loss, alpha=ld_alpha)
        terms.append((weight, loss))
    return weighted_sum(terms)


class _Reader:
    """From a syntax tree to a loss; anything but the grammar is refused where it stands."""

    def __init__(self, text: str):
        self.text = text

    def error(self, node: ast.AST, words: str) -> ChesError:
        """What is wrong with a part of the expression."""
        part = ast.get_source_segment(self.text.strip(), node) or self.text  # type: ignore[arg-type]
        whole = "" if part == self.text.strip() else f" (in --loss {self.text!r})"
        return ChesError(f"{part}: {words}{whole}")

    def loss(self, node: ast.AST, depth: int) -> Loss:
        """The loss that a part of the expression is."""
        if depth > DEEPEST:
            raise ChesError(f"--loss {self.text[:60]!r}...: more than {DEEPEST} brackets within brackets")
        match node:
            case ast.Name(id=name) if name in WRAPPERS:
                raise self.error(node, f"wraps a loss: {name}(dpo)")
            case ast.Name(id=name):
                return self.named(node, name, {})
            case ast.Call(func=ast.Name(id=name)):
                return self.call(node, name, depth)
            case ast.BinOp(op=ast.Add()) | ast.BinOp(op=ast.Mult()):
                return weighted_sum(self.terms(node, depth))
            case ast.List(elts=elts) if depth == 0:
                names = [e.value if isinstance(e, ast.Constant) else getattr(e, "id", None) for e in elts]
                if not names or not all(isinstance(n, str) for n in names):
                    raise self.error(node, f"a list is TRL's loss_type: its names and nothing else; {EXPECTED}")
                return from_trl([str(n) for n in names])
            case ast.Constant():
                raise self.error(node, f"a number, or a text, where a loss should stand; {EXPECTED}")
            case ast.BinOp(op=ast.Sub()) | ast.UnaryOp():
                raise self.error(node, "a loss with a minus would be raised, not lowered; weights are 0 or more")
        raise self.error(node, f"no part of an expression; {EXPECTED}")

    def named(self, node: ast.AST, name: str, numbers: Mapping[str, float]) -> Loss:
        """A loss by its name."""
        if name not in loss_names():
            known = sorted({*loss_names(), *WRAPPERS})
            raise ChesError(unknown_name(name, known))
        return get_loss(name, **numbers)

    def terms(self, node: ast.AST, depth: int) -> list[tuple[float, Loss]]:
        """The terms of a sum from left to right; a chain of a hundred is no depth."""
        parts: list[ast.AST] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts.append(node.right)
            node = node.left
        return [self.term(part, depth) for part in [node, *reversed(parts)]]

    def term(self, node: ast.AST, depth: int) -> tuple[float, Loss]:
        """A weight and a loss."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = (node.left, node.right)
            numbers = [self.number(side) for side in sides]
            if (numbers[0] is None) == (numbers[1] is None):
                raise self.error(node, "a product is of one number and one loss")
            weight, part = (numbers[0], sides[1]) if numbers[0] is not None else (numbers[1], sides[0])
            assert weight is not None
            return weight, self.loss(part, depth + 1)
        return 1.0, self.loss(node, depth + 1)

    def number(self, node: ast.AST) -> float | None:
        """The number that a part is; None for what is none."""
        match node:
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if _is_number(value):
                return -float(value)  # pyright: ignore[reportArgumentType]
            case ast.Constant(value=value) if _is_number(value):
                return float(value)  # pyright: ignore[reportArgumentType]
        return None

    def call(self, node: ast.Call, name: str, depth: int) -> Loss:
        """A loss with its numbers, or a wrapper with the loss that it wraps."""
        numbers = {}
        for keyword in node.keywords:
            value = self.number(keyword.value)
            if keyword.arg is None or value is None or not math.isfinite(value) or keyword.arg in numbers:
                raise self.error(
                    node, f"{keyword.arg or '**'}: expected a number, once, such as {keyword.arg or 'beta'}=0.1"
                )
            numbers[keyword.arg] = value
        if name in WRAPPERS:
            return self.wrapped(node, name, numbers, depth)
        if name in loss_names():
            known = hyper_names(name)
            for place, argument in enumerate(node.args):
                value = self.number(argument)
                if value is None:
                    raise self.error(node, f"{name} is a loss and wraps none; wrappers are {', '.join(WRAPPERS)}")
                if len(known) != 1 or place or numbers:
                    raise self.error(node, f"a number without a name; {name} has {', '.join(known) or 'none'}")
                numbers[known[0]] = value
        elif node.args:
            raise ChesError(unknown_name(name, sorted(WRAPPERS), "wrapper"))
        return self.named(node, name, numbers)

    def wrapped(self, node: ast.Call, name: str, numbers: dict[str, float], depth: int) -> Loss:
        """A wrapper applied."""
        known = WRAPPERS[name].defaults
        if not node.args or self.number(node.args[0]) is not None:
            raise self.error(node, f"{name} wraps a loss: {name}(dpo)")
        for place, argument in enumerate(node.args[1:]):
            value = self.number(argument)
            if value is None:
                raise self.error(node, f"{name} wraps one loss; a sum is one: {name}(dpo + sft)")
            if len(known) != 1 or place or numbers:
                raise self.error(node, f"a number without a name; {name} has {', '.join(known) or 'none'}")
            numbers[next(iter(known))] = value
        for key in numbers.keys() - known.keys():
            there = ", ".join(f"{k} (default {v:g})" for k, v in known.items()) or "none"
            raise self.error(node, f"no number {key!r}{did_you_mean(key, tuple(known))}; {name} has {there}")
        return WRAPPERS[name].make(self.loss(node.args[0], depth + 1), **{**known, **numbers})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
