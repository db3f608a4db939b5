"""Pieces of a page as HTML. Everything that comes from data or files passes ``escape``."""

import base64
import html
import re
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")


def clean(value: object) -> str:
    r"""Text without control characters and without halves of surrogate pairs.

    >>> clean("a\x00b\x1b[31m") == "a\ufffdb\ufffd[31m"
    True
    """
    text = str(value)
    if text.isprintable():  # most short texts: neither is in them
        return text
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(value: object) -> str:
    """Text for an element or an attribute, whatever is in it.

    >>> escape("<b>&'")
    '&lt;b&gt;&amp;&#x27;'
    """
    return html.escape(clean(value))


def data_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1, caption: str = ""
) -> str:
    """A table; the first ``text_columns`` columns are text, the others numbers. Cells are escaped."""

    def cells(values: Sequence[object], tag: str, scope: str = "") -> str:
        kinds = [' class="t" dir="auto"' if i < text_columns else ' class="n"' for i in range(len(values))]
        return "".join(f"<{tag}{scope}{kind}>{escape(v)}</{tag}>" for v, kind in zip(values, kinds, strict=True))

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    scope = ' scope="col"'
    head = f"<thead><tr>{cells(header, 'th', scope)}</tr></thead>"
    name = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll" tabindex="0"><table>{name}{head}<tbody>\n{body}\n</tbody></table></div>'


def figure(name: str, title: str, svg: str, alt: str, caption: str = "", *, wide: bool = False) -> str:
    """A vector figure with its title, words for those who cannot see it, and a button that saves it."""
    drawn = svg.replace('aria-label="ALT"', f'aria-label="{escape(alt)}"', 1)
    css = ' class="wide"' if wide else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    head = f"<header><strong>{escape(title)}</strong></header>"
    return f'<figure{css} data-name="{escape(name)}">{head}{drawn}{below}</figure>'


def picture(image: bytes, alt: str, caption: str, *, name: str = "figure", wide: bool = False) -> str:
    """A figure that another library drew as SVG, as an image: whatever is in it cannot run."""
    data = base64.b64encode(image).decode()
    css = ' class="wide"' if wide else ""
    return (
        f'<figure{css} data-name="{escape(name)}"><header><strong>{escape(caption)}</strong></header>'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}"></figure>'
    )


def gallery(figures: Sequence[str]) -> str:
    """Figures side by side, as many as the page is wide; nothing where there are none."""
    return f'<div class="figures">{"".join(figures)}</div>' if any(figures) else ""


def command(words: str) -> str:
    """A command to copy."""
    return f'<div class="command"><code>{escape(words)}</code></div>'


def paragraphs(*texts: str) -> str:
    """Escaped paragraphs."""
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)


def folded(title: str, body: str) -> str:
    """Something to open."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
