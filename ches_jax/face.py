"""The face of a package: public names that are imported when they are first used, and packages that are called.

``ches_jax.train`` is a package and a verb. Python puts a package into its parent's namespace the moment any module of
it is imported, so the verb cannot stand there beside it; instead the package itself is callable, in whatever order
things are imported: ``ches_jax.train(config)`` is ``ches_jax.train.train(config)``.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """A module that is called as the function of its own name, or of another name where it says so."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._verb(*args, **kwargs)

    @property
    def _verb(self) -> Callable[..., Any]:
        return getattr(self, self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._verb)


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` (PEP 562) of a package whose public names are imported on first use.

    Args:
      package: the package's ``__name__``.
      homes: public name -> module that defines it; relative (``.loop``) or absolute.
    """
    namespace = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(homes[name], package)
        # a verb's package is the verb
        value = module if module.__name__ == f"{package}.{name}" else getattr(module, name)
        namespace[name] = value
        return value

    return get, lambda: sorted({*namespace, *homes})


def make_callable(module: str) -> None:
    """Calls of the module become calls of its function of the same name."""
    sys.modules[module].__class__ = _CallableModule
