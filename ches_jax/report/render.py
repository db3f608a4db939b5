"""From a ``Page`` to one HTML file without network: the skeleton (jinja2), its style, its script, its data.

The page's content policy allows its own script and its own style by their hashes, images in ``data:`` and nothing else,
so that markup which should slip through does nothing.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from ches_jax.report.document import Page
from ches_jax.report.html import clean


def render(page: Page) -> str:
    """The page's text."""
    return "".join(pieces(page))


def pieces(page: Page) -> Iterator[str]:
    """The page's text, a piece after the other: that of a million pairs is never in memory as a whole."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script = asset("page.css"), asset("page.js")
    safe = [(question, Markup(answer)) for question, answer in page.answers]
    sections = [
        {"anchor": s.anchor, "heading": clean(s.heading), "body": Markup(s.body), "folded": s.folded}
        for s in page.sections
    ]
    meta, blocks = page.pairs.encoded() if page.pairs is not None else ({}, {})
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(asset("page.html.j2"))
    return template.generate(
        page={
            "title": clean(page.title),
            "headline": clean(page.headline),
            "subtitle": clean(page.subtitle),
            "kind": page.kind,
            "answers": safe,
            "tone": page.tone,
            "sections": sections,
            "notes": [clean(note) for note in page.notes],
        },
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(json_for_script(meta)),
        blocks={name: map(Markup, texts) for name, texts in blocks.items()},
    )


@cache
def asset(name: str) -> str:
    """A file of ``assets``."""
    return files("ches_jax.report").joinpath("assets", name).read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """The content policy: this script and this style by hash, images in the page, no network."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def json_for_script(value: Any) -> str:
    r"""JSON that no HTML parser can leave, whatever texts it holds.

    >>> json_for_script({"a": "</script>"})
    '{"a":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
