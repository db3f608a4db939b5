"""The checker that the tests put on every function of the library and the theory: arrays have their annotated shapes.

``install`` (called by the ``conftest.py`` beside this folder, before the library is imported) decorates the functions
and dataclasses of a module when it is imported. Only those that name a shape are wrapped: jaxtyping's own hook wraps
every function, which made a training step a quarter dearer to trace. Annotations without a shape are left to pyright,
which reads them all: here a test may pass another object.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source, decode_source
from typing import Any, Literal, TypeVar, get_args, get_origin
from unittest.mock import patch

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

F = TypeVar("F", bound=Callable)
PACKAGES = ("ches_jax", "theory")
NAME = "__checked__"
"""What ``checked`` is called in the modules that are decorated."""


def tells_a_shape(annotation: Any) -> bool:
    """Whether a jaxtyping array is part of the annotation; what is still a string may name one."""
    if get_origin(annotation) is Literal:  # its words are no annotations
        return False
    if isinstance(annotation, str) or (isinstance(annotation, type) and issubclass(annotation, AbstractArray)):
        return True
    return any(tells_a_shape(part) for part in get_args(annotation))


def annotated(function: Any) -> dict[str, Any]:
    """The annotations that name a shape."""
    return {name: a for name, a in getattr(function, "__annotations__", {}).items() if tells_a_shape(a)}


def only_shapes(function: F) -> F:
    """The function with the annotated shapes checked by beartype, and nothing else."""
    function.__annotations__ = annotated(function)
    return beartype(function)


def checked(decorated: Any) -> Any:
    """A function or a dataclass whose annotated shapes are checked when it is called; without any, itself."""
    asked = decorated.__init__ if inspect.isclass(decorated) else decorated
    return jaxtyped(decorated, typechecker=only_shapes) if annotated(asked) else decorated


class Decorate(ast.NodeVisitor):
    """Puts ``checked`` next to every function and above the decorators of every class."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if node.returns or any(a.annotation for a in arguments) or node.args.vararg or node.args.kwarg:
            node.decorator_list.append(ast.copy_location(ast.Name(NAME, ast.Load()), node))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if node.decorator_list:
            node.decorator_list.insert(0, ast.copy_location(ast.Name(NAME, ast.Load()), node))
        self.generic_visit(node)


class Loader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:
        tree = ast.parse(decode_source(data), path)
        Decorate().visit(tree)
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def exec_module(self, module: Any) -> None:
        setattr(module, NAME, checked)
        # bytecode of its own, beside that of the undecorated module
        own = functools.partial(cache_from_source, optimization="shapes")
        with patch("importlib._bootstrap_external.cache_from_source", own):
            super().exec_module(module)


class Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """From here on every module of ``PACKAGES`` is decorated when it is imported."""
    early = sorted(name for name in sys.modules if name.partition(".")[0] in PACKAGES)
    assert not early, f"imported before the checker of shapes: {early}"
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
