"""Tables, figures and one self-contained page from a run directory."""

from ches_jax.report.page import report
from ches_jax.report.summary import summary_text

__all__ = ["report", "summary_text"]
