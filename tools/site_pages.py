"""The pages of the site that are made from the code, and the links of those that live elsewhere in the repository.

A hook of mkdocs (`mkdocs.yml` names it): nothing that it makes is committed, so nothing of it can be out of date.

- ``commands.md``: what ``ches --help`` and ``ches VERB --help`` print.
- ``api.md``: the names of ``import ches_jax``, in the order of the package's face.
- ``statements.md``: every claim of the theory, and the theorems with their equations, from the code of ``theory``.
- pages that live beside the code they speak of: :data:`ELSEWHERE`, with their figures.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from ches_jax.cli import help as cli_help

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file by its path
from equations import drawn

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "theory.md": "theory/README.md",
    "reproduction.md": "experiments/README.md",
    "benchmarks.md": "experiments/benchmarks/README.md",
    "tried.md": "experiments/benchmarks/tried.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the site -> file of the repository."""
STATEMENTS = ("theorems", "coefficients", "entanglement", "related", "dataset")
"""Modules of ``theory.statements`` in the order of the page."""
FIGURES = "repository"
"""Where the site keeps figures of pages that live elsewhere."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def commands_page() -> str:
    """Every verb with its options, as the command prints them."""
    from ches_jax.cli.commands import COMMANDS

    parts = ["# Commands\n\nWhat the command prints; this page is made from it.\n"]
    parts.append(f"```text\n{cli_help.command_help(COMMANDS)}\n```\n")
    for verb, command in COMMANDS.items():
        parts.append(f"## ches {verb}\n\n```text\n{cli_help.verb_help(verb, command)}\n```\n")
    return "\n".join(parts)


def api_page() -> str:
    """A section for each name that the package offers, from the docstring where it is defined."""
    import ches_jax

    parts = ["# Python\n\n`import ches_jax as cj` loads nothing; a name's module is imported when it is first used.\n"]
    for name in ches_jax.__all__:
        if name != "__version__":
            parts.append(f"::: {definition(name)}\n    options: {{heading_level: 2}}\n")
    return "\n".join(parts)


def statements_page() -> str:
    """The claims as a table, then each theorem as its docstring has it."""
    from theory.claims import all_claims

    parts = ["# Claims and theorems\n\nMade from the code. `ches verify --claims ID` checks a claim.\n\n## Claims\n"]
    parts += ["| id | claim | about | checked as | source |", "|---|---|---|---|---|"]
    for c in all_claims():
        cells = (c.id, f"`{c.statement}`", f"{c.scope} models", c.status, c.source)
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for name in STATEMENTS:
        options = "options: {heading_level: 3, show_root_heading: false, members_order: source}"
        parts.append(f"\n## {name.capitalize()}\n\n::: theory.statements.{name}\n    {options}\n")
    return "\n".join(parts)


def definition(name: str) -> str:
    """The dotted place where a public name is written down: documentation is read from there, without importing it.

    >>> definition("train"), definition("bundled")
    ('ches_jax.train.loop.train', 'ches_jax.bundled')
    """
    stubs = (ROOT / "ches_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(rf"from (\S+) import {name} as {name}\b", stubs)
    if found is None:
        raise KeyError(f"{name} has no import in ches_jax/__init__.py")
    return f"{found.group(1)}.{name}"


def moved_links(text: str, source: str, page: str) -> str:
    """Links of a page that lives elsewhere, as the site has them; to what the site does not hold, the words alone.

    Args:
      text: Markdown.
      source: the file it comes from, relative to the repository.
      page: the page of the site it becomes, relative to the site's pages.
    """
    of_source = {file: name for name, file in ELSEWHERE.items()}

    def moved(match: re.Match[str]) -> str:
        mark, words, target, anchor = match.groups()
        file = os.path.normpath(os.path.join(os.path.dirname(source), target)).replace(os.sep, "/")
        if file in of_source:
            new = of_source[file]
        elif file.startswith("docs/"):
            new = file.removeprefix("docs/")
        elif mark:
            new = f"{FIGURES}/{file}"
        else:
            return words
        new = os.path.relpath(new, os.path.dirname(page) or ".").replace(os.sep, "/")
        return f"{mark}[{words}]({new}{anchor or ''})"

    return LINK.sub(moved, text)


def figures_of(text: str, source: str) -> list[str]:
    """Files of the figures of a page, from the root of the repository.

    >>> figures_of("![a](figures/a.png) [b](b.md) ![c](../docs/images/c.svg)", "theory/README.md")
    ['theory/figures/a.png']
    """
    folder = os.path.dirname(source)
    files = [os.path.normpath(os.path.join(folder, m[3])).replace(os.sep, "/") for m in LINK.finditer(text) if m[1]]
    return [file for file in files if not file.startswith("docs/")]


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the pages that no file of ``docs/`` holds, and their figures."""
    from mkdocs.structure.files import File

    made = {"commands.md": commands_page(), "api.md": api_page(), "statements.md": statements_page()}
    figures = set()
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        made[page] = moved_links(text, source, page)
        figures.update(figures_of(text, source))
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for figure in sorted(figures):
        files.append(File.generated(config, f"{FIGURES}/{figure}", abs_src_path=str(ROOT / figure)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs: links of ``docs/`` that lead out of it."""
    source = page.file.src_uri
    if source in ELSEWHERE or source.endswith(".ipynb"):
        return markdown
    return moved_links(markdown, f"docs/{source}", source)


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs: equations as MathML."""
    return drawn(html)
