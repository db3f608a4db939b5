"""The checker that pytest puts on every function of the library and the theory: arrays have their annotated shapes.

``--jaxtyping-packages=ches_jax,theory,tests.shapes.checked`` (in ``pyproject.toml``) decorates each function when its
module is imported. Annotations without a shape are left to pyright, which reads them all: here a test may pass another
object.
"""

from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import beartype
from jaxtyping import AbstractArray

F = TypeVar("F", bound=Callable)


def tells_a_shape(annotation: Any) -> bool:
    """Whether a jaxtyping array is part of the annotation."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(tells_a_shape(part) for part in get_args(annotation))


def checked(function: F) -> F:
    """The function, with the shapes of its arguments and its result checked by beartype."""
    shapes = {name: a for name, a in function.__annotations__.items() if tells_a_shape(a)}
    if not shapes:
        return function
    function.__annotations__ = shapes
    return beartype(function)
