"""What can be read off the Jinja text of a chat template without running it."""

import datetime
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ches_jax.errors import TemplateError

CLOCK = "now"
"""The template argument that pins the clock: a date, in whatever form the template asks for it."""
PINNED = "pinned_dates"
"""The variable that holds what a pinned clock says, by its format."""

_PINNED_CLOCK = (
    "{%- macro strftime_now(form) -%}"
    f"{{{{ {PINNED}[form] if form in {PINNED} else raise_exception('the form of a date is not a constant') }}}}"
    "{%- endmacro %}\n"  # this line end is trimmed, so that what follows still begins a line
)


@dataclass(frozen=True, slots=True)
class Source:
    """The text of a template and the names in it."""

    text: str
    variables: frozenset[str]
    """Names that it looks up and does not set itself."""
    dates: frozenset[str]
    """Forms that it asks the clock for (``strftime_now("%d %b %Y")``)."""

    @property
    def reads_clock(self) -> bool:
        """Whether it may ask for the time."""
        return "strftime_now" in self.variables

    def pinned(self) -> str:
        """The same template with a clock that stands still: it says what the variable ``PINNED`` holds."""
        return _PINNED_CLOCK + self.text


def day(value: Any) -> datetime.datetime:
    """The date (and time) that a pinned clock shows.

    >>> day("2024-07-26").strftime("%d %b %Y")
    '26 Jul 2024'

    Raises:
      TemplateError: it is no date.
    """
    try:
        return datetime.datetime.fromisoformat(str(value))
    except ValueError:
        raise TemplateError(
            f"--template-args {CLOCK}={value}: expected a date such as 2024-07-26, or 2024-07-26T12:30"
        ) from None


@lru_cache(maxsize=32)
def read_source(text: str) -> Source:
    """Parses a template.

    >>> source = read_source("{{ bos_token }}{% set d = strftime_now('%Y') %}{{ d }}{{ messages }}")
    >>> sorted(source.variables), sorted(source.dates)
    (['bos_token', 'messages', 'strftime_now'], ['%Y'])

    Raises:
      TemplateError: it is not Jinja, or draws at random.
    """
    import jinja2
    import jinja2.ext
    import jinja2.meta
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's part and writes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = jinja2.Environment(extensions=[Generation, jinja2.ext.loopcontrols])
    try:
        tree = environment.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is not Jinja: {error.message} (line {error.lineno})") from None
    variables = jinja2.meta.find_undeclared_variables(tree)
    if "lipsum" in variables or any(f.name == "random" for f in tree.find_all(nodes.Filter)):
        raise TemplateError("the chat template draws at random, so that no two runs would read the same text")
    calls = [c for c in tree.find_all(nodes.Call) if isinstance(c.node, nodes.Name) and c.node.name == "strftime_now"]
    forms = [call.args[0].value for call in calls if call.args and isinstance(call.args[0], nodes.Const)]
    return Source(text, frozenset(variables), frozenset(map(str, forms)))
