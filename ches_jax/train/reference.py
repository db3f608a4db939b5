"""Log-probabilities of the reference model: computed once per row, kept on disk, checked before they are used.

A cache file belongs to one identity (weights, tokenizer, convention, dtype) and holds rows by ``row_id``, under the
column names TRL uses. A run that was killed finds the parts it wrote; a larger data set computes only what is new.
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
from ches_jax.files import replacing
from ches_jax.train.evaluate import PairLogps
from ches_jax.types import TokenPair

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
METADATA_KEY = b"ches_jax"
PART_ROWS = 1024
CHECKED_ROWS = 4
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Relative difference at which a cached row counts as another model's; 16-bit computation: 2e-2."""

Evaluate = Callable[[Sequence[TokenPair]], PairLogps]
Known = dict[str, tuple[float, float]]


def cache_key(identity: Mapping[str, Any]) -> str:
    """Name of the cache of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def reference_logps(
    pairs: Sequence[TokenPair], evaluate: Evaluate, identity: Mapping[str, Any], folder: Path
) -> PairLogps:
    """Reference log-probabilities of ``pairs``, from the cache in ``folder`` where it has them.

    Args:
      pairs: the rows.
      evaluate: computes missing rows under the reference model.
      identity: what decides the numbers: fingerprints of weights and tokenizer, convention, dtype.
      folder: where caches lie, one file per identity.

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
        verify([p for p in pairs if p.row_id in known], known, evaluate, final, str(identity.get("dtype")))
    first = len(list(parts.glob("*.parquet")))
    for i, at in enumerate(range(0, len(missing), PART_ROWS), first):
        some = missing[at : at + PART_ROWS]
        found = evaluate(some)
        new = {p.row_id: (float(c), float(r)) for p, c, r in zip(some, *found, strict=True)}
        _require_finite(new, some)
        write_cache(parts / f"{i:06d}.parquet", new, identity)
        known |= new
    if missing:
        write_cache(final, known, identity)
        shutil.rmtree(parts, ignore_errors=True)
    return ordered(pairs, known)


def ordered(pairs: Sequence[TokenPair], known: Known) -> PairLogps:
    """Values in the order of the pairs."""
    values = np.array([known[p.row_id] for p in pairs], np.float64).reshape(len(pairs), 2)
    return PairLogps(values[:, 0], values[:, 1])


def from_file(path: Path, pairs: Sequence[TokenPair], identity: Mapping[str, Any], evaluate: Evaluate) -> PairLogps:
    """Reference log-probabilities of a cache file that the user names.

    Raises:
      RunError: the cache of another model, tokenizer or convention; rows that it does not have.
    """
    known = read_cache(path, identity)
    missing = [p for p in pairs if p.row_id not in known]
    if missing:
        rows = ", ".join(f"row {p.index}" for p in missing[:3])
        raise RunError(f"--reference {path}: has no log-probabilities of {len(missing)} rows ({rows} ...)")
    verify(pairs, known, evaluate, path, str(identity.get("dtype")))
    return ordered(pairs, known)


def verify(pairs: Sequence[TokenPair], known: Known, evaluate: Evaluate, path: Path, dtype: str) -> None:
    """Compute a few cached rows again.

    Raises:
      RunError: they differ by more than rounding.
    """
    some = [pairs[i] for i in sorted({*np.linspace(0, len(pairs) - 1, CHECKED_ROWS).astype(int).tolist()})]
    found, cached = evaluate(some), ordered(some, known)
    tolerance = TOLERANCE.get(dtype, 2e-2)
    for side in range(2):
        for pair, now, then in zip(some, found[side], cached[side], strict=True):
            if not abs(now - then) <= tolerance * max(1.0, abs(now)):
                raise RunError(
                    f"{path}: row {pair.index} has {COLUMNS[side]} {then:.6g}, the reference model gives {now:.6g}: "
                    "the cache is of another model or damaged; remove it, or name its model with --reference DIR"
                )


def read_cache(path: Path, identity: Mapping[str, Any]) -> Known:
    """Rows of a cache file.

    Raises:
      RunError: not a cache, or of another identity; every difference is named.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path}: not a readable reference cache ({error})") from None
    raw = (table.schema.metadata or {}).get(METADATA_KEY)
    if raw is None or not {"row_id", *COLUMNS} <= set(table.column_names):
        raise RunError(f"{path}: not a reference cache (expected columns row_id, {', '.join(COLUMNS)} and metadata)")
    found = json.loads(raw)
    asked = json.loads(json.dumps(dict(identity)))
    differences = [
        f"{key}: {found.get(key)!r} there, {asked.get(key)!r} now"
        for key in sorted({*found, *asked})
        if found.get(key) != asked.get(key)
    ]
    if differences:
        raise RunError(many(f"{path}: the reference cache of another run", differences))
    columns = (table.column(n).to_pylist() for n in ("row_id", *COLUMNS))
    return {row_id: (c, r) for row_id, c, r in zip(*columns, strict=True)}


def write_cache(path: Path, known: Known, identity: Mapping[str, Any]) -> None:
    """Write rows whole or not at all."""
    schema = pa.schema(
        [pa.field("row_id", pa.string()), *(pa.field(n, pa.float64()) for n in COLUMNS)],
        metadata={METADATA_KEY: json.dumps(dict(identity), sort_keys=True).encode()},
    )
    values = list(known.values())
    table = pa.table([list(known), [v[0] for v in values], [v[1] for v in values]], schema=schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _require_finite(values: Known, pairs: Sequence[TokenPair]) -> None:
    for pair in pairs:
        if not np.isfinite(values[pair.row_id]).all():
            raise ChesError(
                f"row {pair.index} (row_id {pair.row_id[:12]}): its reference log-probability is not finite"
            )
