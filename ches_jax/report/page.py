"""``ches report``: one self-contained page from a run directory, with its figures as files."""

from collections.abc import Iterable
from pathlib import Path

from ches_jax.report.score_page import score_report
from ches_jax.report.training_page import is_training_run, training_report
from ches_jax.select.scored_rows import SourceRow


def report(run_dir: Path | str, out: Path | str | None = None, rows: Iterable[SourceRow] | None = None) -> Path:
    """Writes ``report.html`` and ``figures/*.png`` from the directory of a run of ``ches score`` or ``ches train``.

    >>> from tempfile import TemporaryDirectory
    >>> from ches_jax import ScoreConfig, score
    >>> with TemporaryDirectory() as folder:
    ...     report(score(ScoreConfig(limit=4, out=f"{folder}/run"), quiet=True)).name
    'report.html'

    Args:
      run_dir: the directory; a training run may be unfinished.
      out: where to write; the run directory itself when not given. Reports are written over.
      rows: of a score run, the rows that were scored, for their texts; opened from the run when not given.

    Returns:
      The path of the page.

    Raises:
      RunError: the directory of neither, or without a row to report.
    """
    if is_training_run(Path(run_dir)):
        return training_report(Path(run_dir), None if out is None else Path(out))
    return score_report(run_dir, out, rows)
