"""``ches verify``: the claims of the theory, a package that comes with this one."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ches_jax.errors import ChesError
from ches_jax.face import make_callable

make_callable(__name__)


def verify(
    claims: str | Sequence[str] | None = None,
    *,
    seed: int = 0,
    instances: int = 1000,
    model: str | Path | None = None,
    pairs: str | Path | None = None,
    limit: int = 32,
    quiet: bool = False,
) -> list[Any]:
    """Check claims of the theory; one result (``id``, ``passed``, ``value``, ``tolerance``, ...) for each.

    Args:
      claims: their ids, or one; default: all about toy models, or with ``model`` all about real ones.
      seed: of every random number.
      instances: random instances of an exact claim (bounds draw more).
      model: Hugging Face model directory.
      pairs: preference pairs, in any format ``ches score`` reads; default: the bundled ones.
      limit: pairs used of them.
      quiet: no progress bar.

    Raises:
      ChesError: an unknown id, a claim about a real model without one, or no theory.

    >>> [(result.id, result.passed) for result in verify(["L1"], instances=20, quiet=True)]
    [('L1', True)]
    """
    return theory("theory.verify").verify(
        claims, seed=seed, instances=instances, model=model, pairs=pairs, limit=limit, quiet=quiet
    )


def theory(module: str) -> Any:
    """A module of the theory, which is a package of its own: the library does not import it otherwise.

    Raises:
      ChesError: it is not there.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "theory":
            raise
        raise ChesError("the package `theory` of ches-jax is not there: install ches-jax anew") from error
