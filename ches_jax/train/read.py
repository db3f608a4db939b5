"""One source of rows: read, tokenised and audited, with the numbers that its rows bring."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from ches_jax.data.audit import UNSCORABLE, Audit, dropped_record, require_clean
from ches_jax.data.sources import PairSource, open_pairs
from ches_jax.data.tokenize import PairTokenizer
from ches_jax.errors import ChesError, DataError
from ches_jax.losses import Loss
from ches_jax.losses.inputs import REWARDS
from ches_jax.train.config import TrainConfig
from ches_jax.train.examples import NOTHING
from ches_jax.train.objective import is_unpaired
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
COMPLETION, LABEL = "completion", "label"
"""Columns of a row with one response: the response, and whether it is a good one."""
_CHUNK = 1024


@dataclass(frozen=True)
class ReadPairs:
    """The pairs of a source that can be trained on, in its order."""

    pairs: list[TokenPair]
    """Single responses have lent their prompt to a pair; where no other fits, its other side is empty."""
    given: dict[str, np.ndarray]
    """Numbers that the rows bring, by field of ``LossInputs``."""
    dropped: list[dict[str, Any]]
    rows: int
    fingerprint: str


def read_pairs(
    config: TrainConfig, loss: Loss, tokenizer: PairTokenizer, spec: str, split: str | None, limit: int | None
) -> ReadPairs:
    """Read a source for a run.

    Raises:
      ChesError: data that cannot be read or is not fit, under the policy ``on_bad_row``.
    """
    singles = open_singles(spec, split, config.columns) if is_unpaired(loss) else None
    source = singles or open_pairs(spec, split, config.columns)
    asked = _asked_columns(config, loss)
    if singles and asked:
        raise ChesError(f"{asked[0][0]}: {source.name} has rows of one response, of which only the label is read")
    pairs = _tokenised(source, tokenizer, limit)
    if singles:
        pairs = [_single(p) for p in pairs]
    kept, dropped = _fit(source, tokenizer, pairs, config.on_bad_row)
    rows = len(pairs)
    if singles:
        name = config.columns.get(LABEL, LABEL)
        labels = _numbers(source, [(f"--loss {config.loss}", [{"label": name}])], kept, limit)["label"]
        return ReadPairs(together(kept, labels > 0), {}, dropped, rows, source.fingerprint())
    return ReadPairs(kept, _numbers(source, asked, kept, limit), dropped, rows, source.fingerprint())


def open_singles(spec: str, split: str | None, columns: Mapping[str, str]) -> PairSource | None:
    """The rows of a source with ``completion`` (or its ids), each read as two equal responses; None without it."""
    name = columns.get(COMPLETION, COMPLETION)
    others = {k: v for k, v in columns.items() if k not in (COMPLETION, LABEL)}
    sides = {side + kind: name + kind for side in ("chosen", "rejected") for kind in ("", "_ids")}
    try:
        return open_pairs(spec, split, {**others, **sides})
    except DataError:
        if COMPLETION in columns:
            raise
        return None


def _single(pair: TokenPair) -> TokenPair:
    """A row that was read as two equal responses: one of them, and the findings about it."""
    flags = tuple(f for f in pair.flags if f != "identical" and not f.endswith("_rejected"))
    return replace(pair, rejected=NOTHING, flags=flags)


def together(rows: Sequence[TokenPair], good: np.ndarray) -> list[TokenPair]:
    """Single responses to pairs: of each prompt a good one with a bad one, as far as there are both."""
    by_prompt: dict[tuple[int, ...], tuple[list[TokenPair], list[TokenPair]]] = {}
    for row, is_good in zip(rows, good, strict=True):
        by_prompt.setdefault(row.prompt, ([], []))[0 if is_good else 1].append(row)
    pairs = []
    for chosen, rejected in (two for sides in by_prompt.values() for two in zip_longest(*sides)):
        first = chosen or rejected
        if chosen is None:
            pairs.append(replace(rejected, chosen=NOTHING, rejected=rejected.chosen))
        elif rejected is None:
            pairs.append(first)
        else:
            both = hashlib.sha256((chosen.row_id + rejected.row_id).encode()).hexdigest()[:32]
            pairs.append(replace(chosen, row_id=both, rejected=rejected.chosen))
    return pairs


def _asked_columns(config: TrainConfig, loss: Loss) -> list[tuple[str, list[Mapping[str, str]]]]:
    """Options that read numbers from the rows, and for each the columns that would do, by field of ``LossInputs``."""
    asked: list[tuple[str, list[Mapping[str, str]]]] = []
    if config.reference == "columns":
        asked.append(("--reference columns", [dict(zip(REFERENCE_FIELDS, COLUMNS, strict=True))]))
    if config.weights is not None:
        asked.append((f"--weights {config.weights}", [{"weights": config.weights}]))
    if loss.needs >= REWARDS:
        names = [config.rewards.split(",")] if config.rewards else REWARD_COLUMNS
        option = f"--rewards {config.rewards}" if config.rewards else f"--loss {config.loss}"
        asked.append((option, [dict(zip(REWARD_FIELDS, two, strict=True)) for two in names]))
    return asked


def _tokenised(source: PairSource, tokenizer: PairTokenizer, limit: int | None) -> list[TokenPair]:
    pairs: list[TokenPair] = []
    waiting = []
    for row in source:
        if limit is not None and row.index >= limit:
            break
        waiting.append(row)
        if len(waiting) == _CHUNK:
            pairs += tokenizer(waiting)
            waiting = []
    return pairs + (tokenizer(waiting) if waiting else [])


def _fit(
    source: PairSource, tokenizer: PairTokenizer, pairs: Sequence[TokenPair], policy: OnBadRow
) -> tuple[list[TokenPair], list[dict[str, Any]]]:
    """Pairs that can be trained on, and records of those left out."""
    audit = Audit(tokenizer.tokenizer.bos_token_id, tokenizer.tokenizer.eos_token_id)  # type: ignore[arg-type]
    audit.extend(pairs)
    if policy == "error":
        require_clean(audit, source.name)
    bad = [p for p in pairs if (p.flags if policy == "drop" else not UNSCORABLE.isdisjoint(p.flags))]
    out = {id(p) for p in bad}
    kept = [p for p in pairs if id(p) not in out]
    if not kept:
        raise DataError(f"{source.name}: no row is left to train on ({len(pairs)} read, all left out)")
    return kept, [dropped_record(p) for p in bad]


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
