"""``ches diagnose``: did likelihood displacement happen, and how sure is that?"""

from pathlib import Path

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.readers import read_logps, read_run, read_score_tables, read_trl_log
from ches_jax.displacement.verdict import Changes, Diagnosis, diagnose_changes
from ches_jax.errors import ChesError
from ches_jax.face import make_callable

make_callable(__name__)


def diagnose(config: DiagnoseConfig) -> Diagnosis:
    """The verdict on a training run, two score tables, a table of log-probabilities or a TRL log.

    >>> from tempfile import TemporaryDirectory
    >>> from ches_jax import TrainConfig, train
    >>> with TemporaryDirectory() as folder:
    ...     small = {"limit": 8, "holdout": 0, "batch_size": 4, "steps": 1, "mesh": "data=1", "export": False}
    ...     run = train(TrainConfig(**small, lr=1e-9, out=f"{folder}/run"), quiet=True)
    ...     diagnose(DiagnoseConfig(run_dir=str(run))).to_json()["verdict"]
    'not_displaced'

    Raises:
      ChesError: no source or several; a source without the numbers that are needed.
    """
    return diagnose_changes(read_changes(config), config.tolerance)


def read_changes(config: DiagnoseConfig) -> Changes:
    """The changes of log-probabilities in the one source that the options name."""
    named = [n for n in ("run_dir", "before", "logps", "trl_log") if getattr(config, n) is not None]
    if len(named) != 1 or (config.before is None) != (config.after is None):
        raise ChesError("give one of --run DIR, --before DIR --after DIR, --logps FILE, --trl-log FILE")
    if config.run_dir is not None:
        return read_run(Path(config.run_dir))
    if config.before is not None:
        return read_score_tables(Path(config.before), Path(str(config.after)))
    if config.logps is not None:
        return read_logps(Path(config.logps))
    return read_trl_log(Path(str(config.trl_log)), config.beta)
