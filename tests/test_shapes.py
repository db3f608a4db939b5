"""The checker that the tests put on the library: a wrong shape is an error, annotations without shapes are left."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, TypeCheckError

import ches_jax.losses.stable
import ches_jax.scores.unembedding_gradients
import theory.models.kernels
from ches_jax.scores.unembedding_gradients import ches_products
from tests.shapes import Decorate, checked

MODULES = (
    ches_jax.losses.stable,
    ches_jax.scores.unembedding_gradients,
    theory.models.kernels,
)


@checked
def joined(a: Float[Array, "n d"], b: "Float[Array, 'n d']", *, scale: int = 1) -> Float[Array, " n"]:
    return (a + b).sum(axis=1 if scale else None)


@checked
@dataclass
class Held:
    values: Float[Array, " n"]
    names: list[str] = field(default_factory=list)


def test_shapes_are_checked_in_arguments_results_and_fields():
    wide, tall = jnp.ones((2, 3)), jnp.ones((3, 2))
    assert joined(wide, wide, scale="no number of pyright's").shape == (2,)  # pyright: ignore[reportArgumentType]
    for a, b, scale in ((wide, tall, 1), (wide, jnp.ones(3), 1), (wide, wide, 0)):
        with pytest.raises(TypeCheckError):
            joined(a, b, scale=scale)
    assert Held(jnp.ones(3), names=()).names == ()  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeCheckError):
        Held(wide)


def test_what_names_no_shape_is_left_as_it_is():
    def plain(a: int, *b: str, **c: list[float]) -> Iterator[int]:
        yield a

    assert checked(plain) is plain and checked(Plain) is Plain and "__wrapped__" not in vars(Plain.__init__)


@dataclass
class Plain:
    value: int


def test_the_library_is_decorated_when_it_is_imported():
    with pytest.raises(TypeCheckError):
        ches_products(jnp.ones((2, 3, 4)), jnp.zeros((2, 4), int), 2)
    functions = [f for m in MODULES for f in vars(m).values() if inspect.isfunction(f) and f.__module__ == m.__name__]
    named = [f for f in functions if "jaxtyping" in str(inspect.get_annotations(f))]
    assert len(named) > 10 and all(hasattr(f, "__wrapped__") for f in named)
    assert len(functions) > len(named)


def test_nested_functions_methods_and_classes_are_decorated():
    source = "class A:\n  def f(self, a: X):\n    def g() -> X: ...\n@dataclass\nclass B: ...\ndef h(): ..."
    Decorate().visit(tree := ast.parse(source))
    found = {n.name: ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert "@__checked__" not in found["h"] and not found["A"].startswith("@")
    assert found["f"].startswith("@__checked__") and found["g"].startswith("@__checked__")
    assert found["B"].startswith("@__checked__\n@dataclass")
