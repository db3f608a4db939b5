"""The documents say what is so: every file they name exists, every link leads somewhere, ten questions have answers."""

import re
import tomllib
from html import escape
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("theory/*.md"), *ROOT.glob("experiments/*.md")])
PLACE = re.compile(r"`((?:ches_jax|theory|experiments|tests|docs|tools)/[\w./-]+?)`")
"""Paths in words of code; one with a word in capitals stands for many."""
MADE = {(ROOT / "docs" / name).resolve() for name in ("api.md", "commands.md", "statements.md")}
"""Pages of the site that are made from the code when it is built (`tools/site_pages.py`)."""
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
"""A page, and the heading in it."""


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: p.name)
def test_every_file_that_a_page_names_is_there(page):
    named = {m.group(1) for m in PLACE.finditer(page.read_text(encoding="utf-8"))}
    assert sorted(n for n in named if not (ROOT / n).exists() and not re.search(r"[A-Z]{4,}", n)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    links = {m.groups() for m in LINK.finditer(page.read_text(encoding="utf-8")) if "://" not in m.group(1)}
    places = {(n, heading): (page.parent / n).resolve() if n else page for n, heading in links}
    assert sorted(n for (n, _), place in places.items() if not place.exists() and place not in MADE) == []
    assert (
        sorted(f"{n}#{h}" for (n, h), place in places.items() if h and place.exists() and h not in headings(place))
        == []
    )


def headings(page: Path) -> set[str]:
    """What links to a page may name behind #, as GitHub and the site make it of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_a_heading_is_known_by_its_words():
    assert {"a-model-family", "a-score-a-loss-a-data-format-a-verb"} <= headings(ROOT / "CONTRIBUTING.md")


def test_equations_become_mathml(monkeypatch):
    """Every equation of the page of objectives, as Markdown's extension boxes it, is drawn; none is left as TeX."""
    pytest.importorskip("latex2mathml", reason="equations of the site: pip install .[docs]")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from equations import drawn, from_sphinx  # pyright: ignore[reportMissingImports]

    assert from_sphinx("A.\n\n.. math::\n  a_1\n  b\n\nWith :math:`c`.") == "A.\n\n$$ a_1 b $$\n\nWith $c$."
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    equations = re.findall(r"\$\$(.*?)\$\$", page)
    assert len(equations) > 60
    html = drawn("".join(f'<div class="arithmatex">\\[{escape(tex)}\\]</div>' for tex in equations))
    assert html.count("<math") == len(equations) and "\\" not in html
    assert "<mtr>" in drawn(r'<div class="arithmatex">\[a \\ b\]</div>')


def test_the_ten_questions_have_one_answer_each():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| Wh(?:ere|at) .*\? \|", line)]
    assert len(rows) == 10
    assert all((ROOT / PLACE.search(row).group(1)).exists() for row in rows)  # type: ignore[union-attr]


def test_every_folder_of_the_library_is_on_the_architecture_page():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "ches_jax").glob("*/__init__.py")}
    assert sorted(f for f in folders if f"`{f}`" not in text) == []


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert len(re.findall(r"\d+\.\d+", capsys.readouterr().out)) == 4, "two scores of two pairs"


def test_the_readme_counts_the_families():
    from ches_jax.models.families.registry import FAMILIES

    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/families.md"))
    assert f"{len(FAMILIES)} families" in readme
    assert len(re.findall(r"^\| `(?!model_type)\w+` \|", page, re.M)) == len(FAMILIES)


def test_every_extra_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    install = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").partition("## Install")[2]
    named = {name for row in re.findall(r"^\| (`.*?) \|", install, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(project["optional-dependencies"])
    assert f"ches_jax-{project['version']}-" in install
