"""Tables, figures and one self-contained page from a run directory."""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names, make_callable

if TYPE_CHECKING:
    from ches_jax.report.page import report as report
    from ches_jax.report.summary import summary_text as summary_text

_HOMES = {
    "report": ".page",
    "summary_text": ".summary",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
make_callable(__name__)
