r"""Equations of docstrings and pages: from Sphinx's directives to ``$$ ... $$``, and from there to MathML.

>>> from_sphinx(".. math:: a_1\n\nWith :math:`b`.")
'$$ a_1 $$\n\nWith $b$.'
"""

import re
from html import unescape

BOXED = re.compile(r'<(span|div) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.S)
"""What pymdownx.arithmatex makes of an equation in a line, and of one that stands alone."""


def from_sphinx(text: str) -> str:
    r"""Directives and roles as the equations of Markdown; a block keeps its indentation."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r"\.\. math:: (.*(?:\n(?!\n).*)*?)(?=\n\n|\Z)", lambda m: f"$$ {' '.join(m[1].split())} $$", text)
    return re.sub(r"\.\. math::\n((?:[ ]+.*(?:\n|\Z))+)", lambda m: f"$$ {' '.join(m[1].split())} $$\n", text)


def drawn(html: str) -> str:
    r"""The equations of a page as MathML, which browsers draw themselves: no script, and nothing is fetched.

    >>> drawn('<span class="arithmatex">\\(a &lt; b\\)</span>')[:36]
    '<math xmlns="http://www.w3.org/1998/'
    """
    from latex2mathml.converter import convert

    def one(match: re.Match[str]) -> str:
        tex = unescape(match[2]).strip()
        if r"\\" in re.sub(r"\\begin\{(\w+)\}.*?\\end\{\1\}", "", tex, flags=re.S):
            tex = rf"\begin{{array}}{{l}} {tex} \end{{array}}"
        if match[1] == "span":
            return convert(tex)
        return f'<div class="equation">{convert(tex, display="block")}</div>'

    return BOXED.sub(one, html)
