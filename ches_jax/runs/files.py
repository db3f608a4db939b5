"""Files that are there whole or not at all, and JSON objects whose faults are told by name."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ches_jax.errors import ChesError


def _temporary(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name, renamed to ``path`` when the block ends well and removed when not.

    A reader therefore sees the whole file or none, also after the machine stops in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(out: Path, error: type[ChesError]) -> Iterator[Path]:
    """A directory to fill; it gets its name when the block ends well, and is removed otherwise.

    Raises:
      error: ``out`` is there already and is not an empty directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise error(f"{out}: exists and is not an empty directory; choose another --out")
    temporary = _temporary(out)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)  # replaces an empty directory too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_object(path: Path, error: type[ChesError], expected: str) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
      error: it is missing (then ``expected`` says what its directory should be), is not JSON, or is no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path.parent}: no {path.name}; expected {expected}") from None
    except (
        ValueError,
        RecursionError,
    ) as e:  # bytes that are no UTF-8, no JSON, a number of too many digits, a deep nest
        raise error(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
