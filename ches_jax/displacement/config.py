"""The options of ``ches diagnose``: plain data, read by the command line without loading what does the work."""

from dataclasses import dataclass
from typing import Literal

import tyro

from ches_jax.displacement import TOLERANCE
from ches_jax.options import RowOptions, not_identity
from ches_jax.types import Eos, OnBadRow, Pairing, Template


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(RowOptions):
    """What is diagnosed: one of PATH, --before with --after, --logps.

    >>> DiagnoseConfig(path="runs/t").path
    'runs/t'
    """

    path: tyro.conf.Positional[str | None] = None
    """Log or directory of a run: TRL and other trainers, TensorBoard, exports of W&B and trackio, `ches train`."""
    before: str | None = None
    """The first model, or a directory of `ches score --logps` with it; goes with --after."""
    after: str | None = None
    """The second model, an adapter of the first, or the same pairs scored with the same options."""
    logps: str | None = None
    """File (Parquet, CSV, JSON lines) with ref_chosen_logps, ref_rejected_logps (before) and logp_chosen, logp_rejected
    (after)."""
    pairs: str | None = None
    """Held-out pairs that --before and --after score; otherwise where the texts of a run's pairs are."""

    beta: float | None = None
    """The beta of the run, which turns its rewards into nats and margins into preferences; default: from the log, the
    run's options or what lies beside it."""
    rewards: Literal["auto", "changes"] = "auto"
    """changes: the rewards of the log are beta times changes since a reference, though they look otherwise."""
    held_out: str | None = None
    """Name of the evaluation set that counts, where the log has several."""
    tolerance: float = TOLERANCE
    """eps, nats: smaller changes count as none."""

    candidates: Pairing | None = None
    """Pairs of rows with several responses: chosen-against-all or all-pairs."""
    eos: Eos = "include"
    """Whether the terminator of a response counts in |y|, when models are scored: include, exclude or given (where the
    row has it). Answers of --generate count theirs where the model wrote it."""
    template: Template = "auto"
    """Chat template, when models are scored: auto (conversations only), always, or none."""
    max_length: int | None = None
    """Most tokens of prompt and response together, when models are scored."""
    dtype: str = "float32"
    """Dtype of the computation, when models are scored."""
    on_bad_row: OnBadRow = "error"
    """What becomes of flagged rows, when models are scored: error, drop or keep."""

    mesh: str | None = not_identity(None)
    """Devices for the models, such as fsdp=8 or data=2,tensor=2; default: all of them on the data axis."""
    distributed: str = not_identity("off")
    """Several processes: auto (as the cluster says) or coordinator:port,n,id. They run the models together; the first
    one reads and writes everything else."""

    label_noise: float | None = None
    """Share of the labels that is wrong: then the accuracy that the optimum of DPO would have is reported too."""
    unseen: str | None = None
    """Other pairs whose responses no training saw, scored with --before and --after as models: how far those moved."""
    on_policy: bool = False
    """Both responses of each pair were drawn from the first model (temperature 1) and judged afterwards: the fall is
    split into the divergence KL(before || after) and half the margin."""

    scores: tuple[str, ...] = ()
    """Runs of `ches score` on the first model, and tables of forecasts or influences, to join with the pairs."""
    responses_before: str | None = None
    """Responses of the first model: directory of `ches generate` or JSON lines; goes with --responses-after."""
    responses_after: str | None = None
    """Responses of the second model to the same prompts."""
    judgments: tuple[str, ...] = ()
    """Two directories of `ches judge`, of the first and of the second model's responses."""
    want: Literal["refusal", "answer"] | None = None
    """What a good response to those prompts is."""
    generate: str | None = None
    """Prompts that both models answer (twice, drawn at temperature 1, so that KL(before || after) is known) and that
    are judged by rules; with --before and --after as models."""

    out: str | None = not_identity(None)
    """Directory for pairs.parquet (every pair with its numbers and texts), diagnosis.json and score runs."""
    fail_if: str | None = None
    """Exit with 1 when a number is beyond a bound (lld_rate>0.2, margin<=1e-3), or on a word (displaced, harmful)."""
