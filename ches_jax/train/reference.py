"""Log-probabilities of the reference model: computed once per row, kept on disk, checked before they are used.

A cache file belongs to one identity (weights, tokenizer, convention, dtype) and holds rows by ``row_id``, under the
column names TRL uses. A run that was killed finds the parts it wrote; a larger data set computes only what is new.
An objective of tokens has a cache of its own, with one number for each token of a response in place of their sum: its
identity has ``per: token``.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.errors import ChesError, RunError, many
from ches_jax.runs.directory import differences
from ches_jax.runs.files import read_parquet, replacing
from ches_jax.runs.shapes import misfit
from ches_jax.train.observe.pair_logprobs import PairLogps, TokenLogps
from ches_jax.types import TokenPair

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
TOKEN_COLUMNS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
TYPES = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in COLUMNS),
        *(pa.field(name, pa.list_(pa.float64()), nullable=False) for name in TOKEN_COLUMNS),
    ]
)
METADATA_KEY = b"ches_jax"
PART_ROWS = 1024
CHECKED_ROWS = 4
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Relative difference at which a cached row counts as another model's; 16-bit computation: 2e-2."""

Logps = PairLogps | TokenLogps
Evaluate = Callable[[Sequence[TokenPair]], Logps]
Known = dict[str, tuple[Any, Any]]
"""By ``row_id``: for chosen and rejected response a number, or one number a token."""


def cache_key(identity: Mapping[str, Any]) -> str:
    """Name of the cache of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def reference_logps(
    pairs: Sequence[TokenPair], evaluate: Evaluate, identity: Mapping[str, Any], folder: Path, *, write: bool = True
) -> Logps:
    """Reference log-probabilities of ``pairs``, from the cache in ``folder`` where it has them.

    Args:
      pairs: the rows.
      evaluate: computes missing rows under the reference model.
      identity: what decides the numbers: fingerprints of weights and tokenizer, convention, dtype.
      folder: where caches lie, one file per identity.
      write: whether this process keeps what is computed; of several processes only the first does.

    Raises:
      RunError: a cache whose rows are not what the model gives.
    """
    final = folder / f"reference-{cache_key(identity)}.parquet"
    parts = folder / f".{final.stem}.parts"
    known = read_cache(final, identity) if final.exists() else {}
    for part in sorted(parts.glob("*.parquet")):
        known |= read_cache(part, identity)
    missing = list({p.row_id: p for p in pairs if p.row_id not in known}.values())
    if len(missing) < len({p.row_id for p in pairs}):
        verify([p for p in pairs if p.row_id in known], known, evaluate, final, identity)
    first = len(list(parts.glob("*.parquet")))
    for i, at in enumerate(range(0, len(missing), PART_ROWS), first):
        some = missing[at : at + PART_ROWS]
        logps = evaluate(some)
        new = {p.row_id: (c, r) for p, c, r in zip(some, *logps, strict=True)}
        _require_finite(new, some)
        if write:
            write_cache(parts / f"{i:06d}.parquet", new, identity)
        known |= new
    if write and (missing or parts.exists()):  # also where a run was killed between its last part and the whole
        write_cache(final, known, identity)
        shutil.rmtree(parts, ignore_errors=True)
    return ordered(pairs, known, identity)


def _columns(identity: Mapping[str, Any]) -> tuple[str, str]:
    return TOKEN_COLUMNS if identity.get("per") == "token" else COLUMNS


def ordered(pairs: Sequence[TokenPair], known: Known, identity: Mapping[str, Any]) -> Logps:
    """Values in the order of the pairs."""
    sides = [[known[p.row_id][side] for p in pairs] for side in range(2)]
    if _columns(identity) == TOKEN_COLUMNS:
        return TokenLogps(*([np.asarray(v, np.float64) for v in side] for side in sides))
    return PairLogps(*(np.array(side, np.float64) for side in sides))


def from_file(path: Path, pairs: Sequence[TokenPair], identity: Mapping[str, Any], evaluate: Evaluate) -> Logps:
    """Reference log-probabilities of a cache file that the user names.

    Raises:
      RunError: the cache of another model, tokenizer or convention; rows that it does not have.
    """
    known = read_cache(path, identity)
    missing = [p for p in pairs if p.row_id not in known]
    if missing:
        rows = ", ".join(f"row {p.index}" for p in missing[:3])
        raise RunError(f"--reference {path}: has no log-probabilities of {len(missing)} rows ({rows} ...)")
    verify(pairs, known, evaluate, path, identity)
    return ordered(pairs, known, identity)


def verify(
    pairs: Sequence[TokenPair], known: Known, evaluate: Evaluate, path: Path, identity: Mapping[str, Any]
) -> None:
    """Compute a few cached rows again.

    Raises:
      RunError: they differ by more than rounding.
    """
    some = [pairs[i] for i in sorted({*np.linspace(0, len(pairs) - 1, CHECKED_ROWS).astype(int).tolist()})]
    computed, cached = evaluate(some), ordered(some, known, identity)
    tolerance = TOLERANCE.get(str(identity.get("dtype")), 2e-2)
    for name, side, before in zip(_columns(identity), computed, cached, strict=True):
        for pair, now, then in zip(some, side, before, strict=True):
            same = np.shape(now) == np.shape(then)
            if not same or not np.all(np.abs(now - then) <= tolerance * np.maximum(1.0, np.abs(now))):
                raise RunError(
                    f"{path}: row {pair.index} has {name} {np.sum(then):.6g}, the reference model gives "
                    f"{np.sum(now):.6g}: the cache is of another model or damaged; remove it, or name its model with "
                    "--reference DIR"
                )


def read_cache(path: Path, identity: Mapping[str, Any]) -> Known:
    """Rows of a cache file.

    Raises:
      RunError: not a cache, or of another identity; every difference is named.
    """
    table = read_parquet(path, RunError, "a reference cache", optional=TYPES)
    there = _identity_in(table)
    names = _columns(identity)
    if there is None or not any({"row_id", *some} <= set(table.column_names) for some in (COLUMNS, TOKEN_COLUMNS)):
        raise RunError(f"{path}: not a reference cache (expected columns row_id, {', '.join(names)} and metadata)")
    if different := differences(there, json.loads(json.dumps(dict(identity)))):
        raise RunError(many(f"{path}: the reference cache of another run", different))
    columns = (table.column(n).to_pylist() for n in ("row_id", *names))
    return {row_id: (c, r) for row_id, c, r in zip(*columns, strict=True)}


def _identity_in(table: pa.Table) -> dict[str, Any] | None:
    """The identity that a table says it is of."""
    try:
        value = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b""))
    except (ValueError, RecursionError):
        return None
    return value if misfit(value, {"config?": {}, "opened?": {str: {str: str}}}) is None else None


def write_cache(path: Path, known: Known, identity: Mapping[str, Any]) -> None:
    """Write rows whole or not at all."""
    names = _columns(identity)
    metadata = {METADATA_KEY: json.dumps(dict(identity), sort_keys=True).encode()}
    schema = pa.schema([TYPES.field(name) for name in ("row_id", *names)], metadata=metadata)
    values = list(known.values())
    table = pa.table([list(known), [v[0] for v in values], [v[1] for v in values]], schema=schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _require_finite(values: Known, pairs: Sequence[TokenPair]) -> None:
    for pair in pairs:
        if not all(np.isfinite(v).all() for v in values[pair.row_id]):
            raise ChesError(
                f"row {pair.index} (row_id {pair.row_id[:12]}): its reference log-probability is not finite"
            )
