"""The pairs of a run: read, tokenised, audited, split; which of them make which update.

The order of the data is a function of seed and epoch alone, so a position is all that a checkpoint needs to hold.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax import embedded
from ches_jax.data.audit import UNSCORABLE, Audit, dropped_record, require_clean
from ches_jax.data.sources import PairSource, open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer, tokenizer_fingerprint
from ches_jax.errors import ChesError, DataError
from ches_jax.losses.inputs import REWARDS
from ches_jax.models.config import DecoderConfig
from ches_jax.train.config import EMBEDDED, TrainConfig, objective
from ches_jax.train.reference import COLUMNS
from ches_jax.types import OnBadRow, TokenPair

REFERENCE_FIELDS = ("ref_logp_chosen", "ref_logp_rejected")
REWARD_FIELDS = ("rewards_chosen", "rewards_rejected")
REWARD_COLUMNS = (
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""Names under which published data sets keep the scores of the two responses; the first that a row has is read."""
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
    given: dict[str, np.ndarray]
    """Numbers that the rows of ``train`` bring, by field of ``LossInputs``."""
    held_out_given: dict[str, np.ndarray]


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
    asked = _asked_columns(config)
    kept, dropped, rows = _tokenised(main, tokenizer, config.on_bad_row, config.limit)
    given = _numbers(main, asked, kept, config.limit)
    held_out: list[TokenPair] = []
    held_out_given: dict[str, np.ndarray] = {}
    if config.eval_pairs is not None:
        other = open_pairs(config.eval_pairs, None, config.columns)
        prints["eval_fingerprint"] = other.fingerprint()
        held_out, more, _ = _tokenised(other, tokenizer, config.on_bad_row, None)
        dropped += more
        held_out_given = _numbers(other, asked, held_out, None)
    elif config.holdout:
        if config.holdout >= len(kept):
            raise ChesError(f"--holdout {config.holdout}: there are {len(kept)} pairs in all")
        drawn = np.random.default_rng([config.seed, 1]).permutation(len(kept))
        out, stay = np.sort(drawn[: config.holdout]), np.sort(drawn[config.holdout :])
        held_out, kept = [kept[i] for i in out], [kept[i] for i in stay]
        held_out_given = {k: v[out] for k, v in given.items()}
        given = {k: v[stay] for k, v in given.items()}
    chosen = np.random.default_rng([config.seed, 2]).permutation(len(kept))[: config.watch]
    return RunPairs(kept, [kept[i] for i in sorted(chosen)], held_out, dropped, rows, prints, given, held_out_given)


def _asked_columns(config: TrainConfig) -> list[tuple[str, list[Mapping[str, str]]]]:
    """Options that read numbers from the rows, and for each the columns that would do, by field of ``LossInputs``."""
    asked: list[tuple[str, list[Mapping[str, str]]]] = []
    if config.reference == "columns":
        asked.append(("--reference columns", [dict(zip(REFERENCE_FIELDS, COLUMNS, strict=True))]))
    if config.weights is not None:
        asked.append((f"--weights {config.weights}", [{"weights": config.weights}]))
    if objective(config).needs >= REWARDS:
        names = [config.rewards.split(",")] if config.rewards else REWARD_COLUMNS
        option = f"--rewards {config.rewards}" if config.rewards else f"--loss {config.loss}"
        asked.append((option, [dict(zip(REWARD_FIELDS, two, strict=True)) for two in names]))
    return asked


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


def _numbers(
    source: PairSource,
    asked: Sequence[tuple[str, list[Mapping[str, str]]]],
    pairs: Sequence[TokenPair],
    limit: int | None,
) -> dict[str, np.ndarray]:
    """Numbers that the rows themselves bring, for each of ``pairs``."""
    if not asked:
        return {}
    wanted = {p.index for p in pairs}
    found: dict[int, dict[str, float]] = {}
    for index, (where, raw) in enumerate(source.read(0)):
        if limit is not None and index >= limit:
            break
        if index in wanted:
            found[index] = {}
            for option, choices in asked:
                found[index] |= _row_numbers(f"{source.name}, {where}: {option}", choices, raw)
    return {field: np.array([found[p.index][field] for p in pairs]) for field in (found[min(found)] if found else {})}


def _row_numbers(subject: str, choices: Sequence[Mapping[str, str]], raw: Mapping[str, Any]) -> dict[str, float]:
    """The first choice of columns that the row has."""
    for columns in choices:
        if all(name in raw for name in columns.values()):
            values = {field: raw[name] for field, name in columns.items()}
            if all(isinstance(v, int | float) and math.isfinite(v) for v in values.values()):
                return {field: float(v) for field, v in values.items()}
    named = ", or ".join(" and ".join(columns.values()) for columns in choices)
    raise DataError(f"{subject} needs numbers in {named}; the row has {', '.join(map(str, raw))}")


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
