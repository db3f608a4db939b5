"""Did the log-probabilities of pairs move, which way, and what is the verdict on a run?"""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names

if TYPE_CHECKING:
    from ches_jax.displacement.changes import displacement_summary as displacement_summary
    from ches_jax.displacement.config import DiagnoseConfig as DiagnoseConfig
    from ches_jax.displacement.diagnose import diagnose as diagnose
    from ches_jax.displacement.verdict import Diagnosis as Diagnosis
    from ches_jax.displacement.verdict import diagnose_changes as diagnose_changes

TOLERANCE = 0.05
"""Default eps in nats: above the rounding of float32 sums, below what changes a text."""

_HOMES = {
    "diagnose": ".diagnose",
    "DiagnoseConfig": ".config",
    "displacement_summary": ".changes",
    "Diagnosis": ".verdict",
    "diagnose_changes": ".verdict",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
