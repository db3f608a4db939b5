"""A page without scripts and without network: escaping, tables, figures, texts.

Everything that comes from data or files passes ``escape``. Should markup slip through all the same, the
page's content policy allows no script and no address outside the page.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
_SHORT = 500
_MOST_TOKENS = 400
_LONGEST = 20_000

STYLE = """
:root { color-scheme: light; }
body { color: #1a1a1a; background: #fff; font: 16px/1.5 system-ui, sans-serif; max-width: 70rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.3rem; margin-top: 2.5rem;
  border-bottom: 1px solid #ccc; } h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p, li { max-width: 46rem; } a { color: #1f5f99; }
nav a { margin-right: 1rem; white-space: nowrap; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.t + td.t { min-width: 11rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; border: 1px solid #eee; }
@media (min-width: 52rem) { .span { grid-column: span 2; } }
figcaption { font-size: .85rem; color: #444; }
article { border: 1px solid #ccc; border-radius: 6px; padding: .6rem .9rem; margin: .7rem 0; }
article header { font-size: .85rem; color: #444; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 0 1.2rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: .1rem 0 .6rem; }
.label { font-size: .8rem; font-weight: 600; margin: .5rem 0 0; }
.chosen { color: #14532d; } .rejected { color: #9a3412; }
summary { cursor: pointer; } .note { background: #f5f5f5; border-left: 4px solid #8a8a8a; padding: .5rem .8rem; }
@media print { details > * { display: block; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{lead}
<nav>{links}</nav>
<main>
{sections}
</main>
</body>
</html>
"""


def escape(value: object) -> str:
    """Text for an element or an attribute, whatever is in it.

    >>> escape("<b>&'")
    '&lt;b&gt;&amp;&#x27;'
    """
    text = str(value).encode("utf-8", "replace").decode()
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The page from ``(anchor, heading, body)`` of its sections; bodies and lead are HTML."""
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a> ' for anchor, heading, _ in sections)
    bodies = "\n".join(
        f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n{body}\n</section>' for anchor, heading, body in sections
    )
    return _PAGE.format(title=escape(title), style=STYLE, lead=lead, links=links, sections=bodies)


def data_table(header: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1) -> str:
    """A table; the first ``text_columns`` columns are text, the others numbers. Cells are escaped."""

    def cells(values: Sequence[object], tag: str) -> str:
        kinds = [' class="t"' if i < text_columns else ' class="n"' for i in range(len(values))]
        return "".join(f"<{tag}{kind}>{escape(v)}</{tag}>" for v, kind in zip(values, kinds, strict=True))

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def picture(png: bytes, alt: str, caption: str, *, wide: bool = False) -> str:
    """A figure that is part of the page, with words for those who cannot see it; ``wide``: as two in a gallery."""
    data = base64.b64encode(png).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
    return f"<figure{' class=span' * wide}>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def gallery(pictures: Sequence[str]) -> str:
    """Figures side by side, as many as the page is wide; nothing where there are none."""
    return f'<div class="figures">{"".join(pictures)}</div>' if pictures else ""


def text_block(label: str, text: str, kind: str = "") -> str:
    """A text of the data; a long one shows its beginning and opens on request, without a script."""
    cut = text if len(text) <= _LONGEST else text[:_LONGEST]
    left = f" [{len(text) - _LONGEST} more characters are not shown]" if cut is not text else ""
    head = f'<p class="label {kind}">{escape(label)}</p>'
    if len(cut) <= _SHORT:
        return f'{head}<div class="text" dir="auto">{escape(cut) or "(empty)"}</div>'
    start = escape(" ".join(cut[:_SHORT].split())[:160])
    whole = f'<div class="text" dir="auto">{escape(cut)}{escape(left)}</div>'
    return f"{head}<details><summary>{start} … ({len(text)} characters)</summary>{whole}</details>"


def token_map(label: str, tokens: Sequence[tuple[str, float]], largest: float, kind: str = "") -> str:
    """Tokens coloured by a number: red for positive, blue for negative, stronger for larger; without a script.

    The number stands in each token's title, and large ones are underlined.
    """
    shown = []
    for text, value in tokens[:_MOST_TOKENS]:
        share = min(abs(value) / largest, 1.0) if largest > 0 else 0.0
        colour = "215,48,39" if value > 0 else "69,117,180"
        mark = ";text-decoration:underline" if share > 0.5 else ""
        style = f"background:rgba({colour},{0.75 * share:.2f}){mark}"
        shown.append(f'<span style="{style}" title="{value:+.4g}">{escape(text)}</span>')
    left = len(tokens) - len(shown)
    rest = f"<span> … {left} more tokens</span>" if left else ""
    return f'<p class="label {kind}">{escape(label)}</p><div class="text" dir="auto">{"".join(shown)}{rest}</div>'


def paragraphs(*texts: str) -> str:
    """Escaped paragraphs."""
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)
