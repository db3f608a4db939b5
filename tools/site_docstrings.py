"""Docstrings as Markdown, for the reference pages: examples as code blocks, Sphinx's roles as code words and equations.

An extension of griffe (`mkdocs.yml` names it).
"""

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file by its path
from equations import from_sphinx

ROLE = re.compile(r":(?:func|class|data|mod|meth):`~?([^`]+)`")


def as_markdown(text: str) -> str:
    r"""Fence what stands as ``>>>`` lines with their output.

    >>> print(as_markdown("Adds.\n\n>>> 1 + 1\n2"))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    parts = re.split(r"\n[ \t]*\n", ROLE.sub(r"`\1`", from_sphinx(text)))
    fenced = [f"```pycon\n{part.strip(chr(10))}\n```" if part.lstrip().startswith(">>>") else part for part in parts]
    return "\n\n".join(fenced)


class Docstrings(griffe.Extension):
    """Every docstring that mkdocstrings shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
