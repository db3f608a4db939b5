"""The model and the pairs that ship with the package; the recipe is in ``experiments/bundled``.

>>> pairs_file().name
'pairs.jsonl'

Nothing is read at import time.
"""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

BUNDLED = "bundled"
"""What ``--model``, ``--pairs`` and ``--prompts`` call them."""


def located(spec: str, shipped: Callable[[], Path]) -> str:
    """``spec``, or the path of what ships where it is ``bundled``.

    >>> located("my.jsonl", pairs_file), located("bundled", pairs_file) == str(pairs_file())
    ('my.jsonl', True)
    """
    return str(shipped()) if spec == BUNDLED else spec


def model_dir() -> Path:
    """The bundled model as a Hugging Face directory."""
    return _path("model")


def pairs_file() -> Path:
    """The bundled preference pairs: ``prompt, chosen, rejected, category``."""
    return _path("pairs.jsonl")


def prompts_file() -> Path:
    """Probe prompts for the bundled model: ``prompt, category, split, expected``."""
    return _path("prompts.jsonl")


def refusal_openings_file() -> Path:
    """Openings of the bundled model's refusals, one a line: a rule file of ``ches judge --rules``."""
    return _path("refusal_openings.txt")


def _path(name: str) -> Path:
    # The artefacts are read by libraries that want a file's name, so the package must lie unpacked
    # on disk, as pip leaves it.
    return Path(str(files(__name__).joinpath(name)))
