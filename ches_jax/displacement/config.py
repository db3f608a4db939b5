"""The options of ``ches diagnose``: plain data, read by the command line without loading what does the work."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ches_jax.displacement.changes import TOLERANCE


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Where the log-probabilities are: exactly one of --run, --before with --after, --logps, --trl-log.

    >>> DiagnoseConfig(run_dir="runs/t").run_dir
    'runs/t'
    """

    run_dir: Annotated[str | None, tyro.conf.arg(name="run")] = None
    """Directory of `ches train`: its last evaluation, held-out pairs where there are any."""
    before: str | None = None
    """Directory of `ches score --logps` with the first model; goes with --after."""
    after: str | None = None
    """The same pairs with the second model, scored with the same options."""
    logps: str | None = None
    """Parquet file with ref_chosen_logps, ref_rejected_logps (before) and logp_chosen, logp_rejected (after)."""
    trl_log: str | None = None
    """trainer_state.json of TRL's DPOTrainer, or the folder with it: means of batches only."""
    beta: float = 0.1
    """The beta of that run, which turns its rewards into nats."""
    tolerance: float = TOLERANCE
    """eps, nats: smaller changes count as none."""
    fail_if: str | None = None
    """Exit with 1 when a number is beyond a bound (lld_rate>0.2, margin<=1e-3), or on a verdict (displaced)."""
