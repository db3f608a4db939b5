"""Part files: one finished chunk each, written whole or not at all, joined at the end.

parts/part-000007.parquet     the chunk's rows of the table; its presence marks the chunk as done
parts/dropped-000007.jsonl    rows it dropped
parts/tokens-000007.parquet   its token scores
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.data.audit import dropped_record
from ches_jax.errors import RunError
from ches_jax.files import replacing
from ches_jax.scores.table import FILE_NAME, merge_parts, write_part
from ches_jax.types import TokenPair

FOLDER = "parts"
DROPPED = "dropped.jsonl"
TOKENS = "token_scores.parquet"
TOKEN_SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "index": pa.int64(),
        "response": pa.string(),
        "position": pa.int32(),
        "token": pa.int32(),
        "text": pa.string(),
        "ches": pa.float64(),
        "head_score": pa.float64(),
    }
)


def part(out: Path, number: int) -> Path:
    """The table part of a chunk."""
    return out / FOLDER / f"part-{number:06d}.parquet"


def finished(out: Path) -> int:
    """How many chunks from the first on are done without a gap."""
    number = 0
    while part(out, number).exists():
        number += 1
    return number


def write(
    out: Path,
    number: int,
    columns: dict[str, Any],
    dropped: list[TokenPair],
    tokens: dict[str, list] | None,
    metadata: dict[str, Any],
) -> None:
    """One chunk: what goes beside the table first, the part last."""
    folder = out / FOLDER
    if dropped:
        with replacing(folder / f"dropped-{number:06d}.jsonl") as temporary:
            lines = [json.dumps(dropped_record(p), ensure_ascii=False) + "\n" for p in dropped]
            temporary.write_text("".join(lines), encoding="utf-8")
    if tokens is not None:
        with replacing(folder / f"tokens-{number:06d}.parquet") as temporary:
            pq.write_table(pa.table(tokens, schema=TOKEN_SCHEMA), temporary)
    write_part(part(out, number), columns, metadata)


def merge(out: Path) -> dict[str, int]:
    """Join all parts of a run into the table, the list of dropped rows and the token table; the parts then go.

    Returns:
      Counts of rows: in all, kept, dropped.

    Raises:
      RunError: no parts, a missing part, a row twice.
    """
    folder = out / FOLDER
    numbers = sorted(int(p.stem.rpartition("-")[2]) for p in folder.glob("part-*.parquet"))
    if not numbers:
        raise RunError(f"{out}: no parts to merge; was anything scored?")
    missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
    if missing:
        shown = ", ".join(map(str, missing[:10]))
        raise RunError(f"{out}: {len(missing)} parts are missing ({shown}): start the run again with --resume")
    dropped = 0
    lists = sorted(folder.glob("dropped-*.jsonl"))
    if lists:
        with replacing(out / DROPPED) as temporary, temporary.open("wb") as f:
            for path in lists:
                content = path.read_bytes()
                dropped += content.count(b"\n")
                f.write(content)
    tokens = sorted(folder.glob("tokens-*.parquet"))
    if tokens:
        with replacing(out / TOKENS) as temporary, pq.ParquetWriter(temporary, TOKEN_SCHEMA) as writer:
            for path in tokens:
                writer.write_table(pq.read_table(path))
    kept = merge_parts([part(out, n) for n in numbers], out / FILE_NAME)
    shutil.rmtree(folder)
    return {"rows": kept + dropped, "kept": kept, "dropped": dropped}
