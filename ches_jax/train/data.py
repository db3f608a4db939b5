"""The pairs of a run: read, tokenised, audited, split; which of them make which update.

The order of the data is a function of seed and epoch alone, so a position is all that a checkpoint needs to hold.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax import embedded
from ches_jax.data.audit import UNSCORABLE, Audit, dropped_record, require_clean
from ches_jax.data.sources import PairSource, open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer, tokenizer_fingerprint
from ches_jax.errors import ChesError, DataError
from ches_jax.models.config import DecoderConfig
from ches_jax.train.config import EMBEDDED, TrainConfig
from ches_jax.train.evaluate import PairLogps
from ches_jax.train.reference import COLUMNS
from ches_jax.types import OnBadRow, TokenPair

_CHUNK = 1024


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
    fingerprints: dict[str, str]
    columns: dict[str, tuple[float, float]]
    """Reference log-probabilities that the rows bring, by ``row_id``; empty unless asked for."""
    weights: dict[str, float]
    """Weight of each row, by ``row_id``; empty unless asked for."""


def read_run_pairs(config: TrainConfig, directory: Path, decoder: DecoderConfig) -> RunPairs:
    """Read everything a run needs of its data.

    Raises:
      ChesError: data that cannot be read or is not fit, under the policy ``on_bad_row``.
    """
    if config.max_length is not None and decoder.rope is None and config.max_length > decoder.max_positions:
        raise ChesError(
            f"--max-length {config.max_length}: the model has learned positions for {decoder.max_positions} tokens only"
        )
    tokenizer = PairTokenizer(
        load_tokenizer(directory),
        max_length=config.max_length or decoder.max_positions,
        eos=config.eos,
        vocab_size=decoder.vocab_size,
        template=config.template,
    )
    prints = {"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer.tokenizer)}
    main = open_pairs(
        str(embedded.pairs_file()) if config.pairs == EMBEDDED else config.pairs, config.split, config.columns
    )
    prints["data_fingerprint"] = main.fingerprint()
    kept, dropped, rows = _tokenised(main, tokenizer, config.on_bad_row, config.limit)
    found: dict[str, Any] = {}
    if config.reference == "columns":
        found = _numbers(main, COLUMNS, "--reference columns", config.limit)
    weights = {}
    if config.weights is not None:
        named = _numbers(main, (config.weights,), f"--weights {config.weights}", config.limit)
        weights = {row_id: values[0] for row_id, values in named.items()}
    held_out: list[TokenPair] = []
    if config.eval_pairs is not None:
        other = open_pairs(config.eval_pairs, None, config.columns)
        prints["eval_fingerprint"] = other.fingerprint()
        held_out, more, _ = _tokenised(other, tokenizer, config.on_bad_row, None)
        dropped += more
        if config.reference == "columns":
            found |= _numbers(other, COLUMNS, "--reference columns", None)
    elif config.holdout:
        if config.holdout >= len(kept):
            raise ChesError(f"--holdout {config.holdout}: there are {len(kept)} pairs in all")
        out = set(np.random.default_rng([config.seed, 1]).permutation(len(kept))[: config.holdout].tolist())
        held_out = [p for i, p in enumerate(kept) if i in out]
        kept = [p for i, p in enumerate(kept) if i not in out]
    chosen = np.random.default_rng([config.seed, 2]).permutation(len(kept))[: config.watch]
    return RunPairs(kept, [kept[i] for i in sorted(chosen)], held_out, dropped, rows, prints, found, weights)


def _tokenised(
    source: PairSource, tokenizer: PairTokenizer, policy: OnBadRow, limit: int | None
) -> tuple[list[TokenPair], list[dict[str, Any]], int]:
    """Pairs that can be trained on, records of those left out, and the number of rows."""
    audit = Audit(tokenizer.tokenizer.bos_token_id, tokenizer.tokenizer.eos_token_id)  # type: ignore[arg-type]
    pairs: list[TokenPair] = []
    waiting = []
    for row in source:
        if limit is not None and row.index >= limit:
            break
        waiting.append(row)
        if len(waiting) == _CHUNK:
            pairs += tokenizer(waiting)
            waiting = []
    pairs += tokenizer(waiting) if waiting else []
    audit.extend(pairs)
    if policy == "error":
        require_clean(audit, source.name)
    bad = [p for p in pairs if (p.flags if policy == "drop" else not UNSCORABLE.isdisjoint(p.flags))]
    out = {id(p) for p in bad}
    kept = [p for p in pairs if id(p) not in out]
    if not kept:
        raise DataError(f"{source.name}: no row is left to train on ({len(pairs)} read, all left out)")
    return kept, [dropped_record(p) for p in bad], len(pairs)


def _numbers(source: PairSource, names: Sequence[str], option: str, limit: int | None) -> dict[str, tuple[float, ...]]:
    """Numbers that the rows themselves bring, by ``row_id``."""
    found = {}
    for row, (where, raw) in zip(source, source.read(0), strict=False):
        if limit is not None and row.index >= limit:
            break
        values = [raw.get(name) for name in names]
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise DataError(f"{source.name}, {where}: {option} needs numbers in {' and '.join(names)}")
        found[row.row_id] = tuple(float(v) for v in values)
    return found


def write_dropped(path: Path, dropped: Sequence[dict[str, Any]]) -> None:
    """The list of rows left out, with reasons; no file where there are none."""
    if dropped:
        path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in dropped), encoding="utf-8")


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
        mine = order[at * self.batch_size : (at + 1) * self.batch_size]
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]


def make_plan(config: TrainConfig, pairs: int) -> Plan:
    """The plan of a run over so many pairs."""
    per_epoch = -(-pairs // config.batch_size)
    total = config.steps if config.steps is not None else max(1, math.ceil(config.epochs * per_epoch - 1e-9))
    return Plan(pairs, config.batch_size, config.accumulate, total, config.seed)


def reference_from_columns(pairs: Sequence[TokenPair], columns: dict[str, tuple[float, float]]) -> PairLogps:
    """Reference log-probabilities that the rows bring, in the order of the pairs."""
    values = np.array([columns[p.row_id] for p in pairs], np.float64).reshape(len(pairs), 2)
    return PairLogps(values[:, 0], values[:, 1])
