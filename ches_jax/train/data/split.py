"""The pairs of a run: read, tokenised, audited, split; which of them make which update.

The order of the data is a function of seed and epoch alone, so a position is all that a checkpoint needs to hold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.distributed.processes import Process
from ches_jax.errors import ChesError
from ches_jax.inputs import ModelFiles, Opener
from ches_jax.losses import Loss
from ches_jax.runs.chunks import write_lines
from ches_jax.train.config import TrainConfig
from ches_jax.train.data.rows import read_pairs
from ches_jax.types import TokenPair


@dataclass(frozen=True)
class RunPairs:
    """Pairs a run trains on, watches and holds out."""

    train: list[TokenPair]
    watched: list[TokenPair]
    """A sample of ``train``, in its order."""
    held_out: list[TokenPair]
    dropped: list[dict[str, Any]]
    rows: int
    """Rows of the source."""
    extra: dict[str, np.ndarray]
    """Numbers that the rows of ``train`` bring, by field of ``LossInputs``."""
    held_out_extra: dict[str, np.ndarray]


def read_run_pairs(
    config: TrainConfig, loss: Loss, model: ModelFiles, opener: Opener, process: Process | None = None
) -> RunPairs:
    """Read everything a run needs of its data.

    Args:
      config: which data, and how they are read.
      loss: the objective, which decides what a row must hold.
      model: whose tokenizer, vocabulary and number of positions count.
      opener: opens the data.
      process: which of several processes this is.

    Raises:
      ChesError: data that cannot be read or is not fit, under the policy ``on_bad_row``.
    """
    opener.tokenizer(model, config.template)
    tokenizer = model.pair_tokenizer(
        max_length=config.max_length, eos=config.eos, template=config.template, template_args=config.template_args
    )
    process = process or Process()
    main = read_pairs(config, loss, tokenizer, config.pairs, config.split, config.limit, process, opener, "pairs")
    kept, extra, dropped = main.pairs, main.extra, main.dropped
    held_out: list[TokenPair] = []
    held_out_extra: dict[str, np.ndarray] = {}
    if config.eval_pairs is not None:
        other = read_pairs(config, loss, tokenizer, config.eval_pairs, None, None, process, opener, "eval_pairs")
        held_out, held_out_extra, dropped = other.pairs, other.extra, dropped + other.dropped
    elif config.holdout:
        out, stay = _drawn(kept, config.holdout, config.seed)
        held_out, kept = [kept[i] for i in out], [kept[i] for i in stay]
        held_out_extra = {k: v[out] for k, v in extra.items()}
        extra = {k: v[stay] for k, v in extra.items()}
    chosen = np.random.default_rng([config.seed, 2]).permutation(len(kept))[: config.watch]
    return RunPairs(kept, [kept[i] for i in sorted(chosen)], held_out, dropped, main.rows, extra, held_out_extra)


def _drawn(pairs: Sequence[TokenPair], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the pairs of ``count`` random rows of the data, and of all others; both rising."""
    rows, row_of = np.unique([p.index for p in pairs], return_inverse=True)
    if count >= len(rows):
        raise ChesError(f"--holdout {count}: there are {len(rows)} rows in all")
    drawn = np.random.default_rng([seed, 1]).permutation(len(rows))[:count]
    out = np.isin(row_of, drawn)
    return np.flatnonzero(out), np.flatnonzero(~out)


def write_dropped(path: Path, dropped: Sequence[dict[str, Any]]) -> None:
    """The list of rows left out, with reasons; no file where there are none."""
    if dropped:
        write_lines(path, dropped)


@dataclass(frozen=True)
class Plan:
    """Which pairs make which update: a seeded permutation per epoch, cut into updates and micro-batches."""

    pairs: int
    batch_size: int
    accumulate: int
    total: int
    """Updates of the run."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Updates of an epoch; the last takes the pairs that are left."""
        return -(-self.pairs // self.batch_size)

    @property
    def micro_batch(self) -> int:
        """Pairs of a full micro-batch."""
        return -(-min(self.batch_size, self.pairs) // self.accumulate)

    def position(self, step: int) -> dict[str, int]:
        """Where the data stand after ``step`` updates."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return {"epoch": epoch, "pair": at * self.batch_size, "seed": self.seed, "pairs": self.pairs}

    def update(self, step: int) -> list[np.ndarray]:
        """Indices of the pairs of update ``step`` (from 0), by micro-batch."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, 3, epoch]).permutation(self.pairs)
        batch = order[at * self.batch_size : (at + 1) * self.batch_size]
        return [batch[i : i + self.micro_batch] for i in range(0, len(batch), self.micro_batch)]


def whole_pass(pairs: int, like: Plan) -> Plan:
    """A plan that takes every example once, in batches of the size of another plan's micro-batches."""
    size = min(like.micro_batch, pairs)
    return Plan(pairs, size, 1, -(-pairs // size), like.seed)


def make_plan(config: TrainConfig, pairs: int) -> Plan:
    """The plan of a run over so many pairs."""
    per_epoch = -(-pairs // config.batch_size)
    total = config.steps if config.steps is not None else max(1, math.ceil(config.epochs * per_epoch - 1e-9))
    return Plan(pairs, config.batch_size, config.accumulate, total, config.seed)
