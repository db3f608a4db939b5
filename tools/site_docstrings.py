"""Docstrings as Markdown, for the reference pages: examples as code blocks, Sphinx's roles as code words and equations.

An extension of griffe (`mkdocs.yml` names it).
"""

import re
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file by its path
from equations import from_sphinx

ROLE = re.compile(r":(?:func|class|data|mod|meth):`~?([^`]+)`")
HEADING = re.compile(r"^\s*Examples?:[ \t]*\n")


def as_markdown(text: str) -> str:
    r"""Fence what stands as ``>>>`` lines with their output, also below a heading ``Example:``.

    >>> as_markdown("Adds.\n\nExample:\n  >>> 1 + 1\n  2").splitlines()
    ['Adds.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    parts = re.split(r"\n[ \t]*\n", ROLE.sub(r"`\1`", from_sphinx(text)))
    examples = [dedent(HEADING.sub("", part).strip("\n")) for part in parts]
    fenced = [
        f"```pycon\n{example}\n```" if example.startswith(">>>") else part
        for part, example in zip(parts, examples, strict=True)
    ]
    return "\n\n".join(fenced)


class Docstrings(griffe.Extension):
    """Every docstring that mkdocstrings shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
