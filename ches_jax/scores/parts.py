"""The chunks of a score run (``runs.chunks``): a part of the table each, dropped rows and token scores beside it.

parts/part-000007.parquet     the chunk's rows of the table
parts/dropped-000007.jsonl    rows it dropped
parts/tokens-000007.parquet   its token scores
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.data.audit import dropped_record
from ches_jax.errors import RunError
from ches_jax.runs import chunks
from ches_jax.runs.files import parquet_source, read_parquet, replacing
from ches_jax.scores.table import CANDIDATES, FILE_NAME, merge_parts, open_parquet, with_columns, write_part
from ches_jax.types import TokenPair

SUFFIX = ".parquet"
TOKENS = "token_scores.parquet"
TOKEN_SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "index": pa.int64(),
        "chosen_candidate": pa.int32(),
        "rejected_candidate": pa.int32(),
        "response": pa.string(),
        "position": pa.int32(),
        "token": pa.int32(),
        "text": pa.string(),
        "logp": pa.float64(),
        "ches": pa.float64(),
        "head_score": pa.float64(),
        "nthr": pa.float64(),
    }
)
r"""One row per predicted token of a pair; tokens that both responses begin with are listed with the chosen one.

``ches`` and ``head_score``: of a chosen token what it adds to the pair's score, of a rejected one its product with the
chosen response (``unembedding_gradients.pair_contributions``). ``*_candidate``: as in the score table, where it has
them.

``logp`` (null without ``--logps``): its log-probability, nats.

``nthr`` (null without ``--by head_score``): how far unlearning the token pulls the chosen response down through the
unembedding, and for the chosen response's own tokens how far learning it pushes that up,

.. math:: s_{k'} = \sum_k \alpha_{k,k'} \langle h_{x, y^+_{<k}}, h_{x, y_{<k'}} \rangle

with the coefficients of the module ``head``: the token scores :math:`s^-, s^+` of negative token hidden reward (Deng et
al., On the Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization,
https://arxiv.org/abs/2505.18830) for a group with one correct response, over the whole vocabulary. With several, add up
the rows of one rejected response over its pairs. NTHR spares the rejected tokens with :math:`s^- > \beta \tau`,
:math:`\tau` the mean of :math:`s^+` over the chosen response's tokens (the least of these means over the correct
responses), :math:`\beta = 1`.
"""


def _without(names: Collection[str]) -> pa.Schema:
    return pa.schema([field for field in TOKEN_SCHEMA if field.name not in names])


def part(out: Path, number: int) -> Path:
    """The table part of a chunk."""
    return chunks.path(out, number, SUFFIX)


def write(
    out: Path,
    number: int,
    columns: dict[str, Any],
    dropped: list[TokenPair],
    tokens: dict[str, list] | None,
    metadata: dict[str, Any],
) -> None:
    """One chunk."""
    files = chunks.write_dropped(out, number, map(dropped_record, dropped))
    if tokens is not None:
        files.append(chunks.path(out, number, SUFFIX, "tokens"))
        with replacing(files[-1]) as temporary:
            pq.write_table(pa.table(tokens, schema=_without(() if CANDIDATES[0] in tokens else CANDIDATES)), temporary)
    write_part(part(out, number), columns, metadata)
    chunks.commit(out, number, len(columns["row_id"]) + len(dropped), [*files, part(out, number)])


def merge(out: Path) -> None:
    """Join all parts of a run into the table, the list of dropped rows and the token table; the table last.

    Raises:
      RunError: a part that is missing, damaged or of another run, a row twice.
    """
    count = chunks.require_whole(out)
    chunks.join_dropped(out, count)
    tokens = [p for n in range(count) if (p := chunks.path(out, n, SUFFIX, "tokens")).is_file()]
    if tokens:
        names = {name for path in tokens for name in _names(path)}
        schema = _without(set(TOKEN_SCHEMA.names) - names)
        with replacing(out / TOKENS) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for path in tokens:
                table = read_parquet(path, RunError, "the token scores of a chunk", optional=schema)
                writer.write_table(with_columns(table, schema))
    merge_parts([part(out, n) for n in range(count)], out / FILE_NAME)


def _names(path: Path) -> list[str]:
    with open_parquet(path) as file:
        return file.schema_arrow.names


def counts(out: Path) -> dict[str, int]:
    """Rows of a joined run: in all, kept, dropped."""
    kept, dropped = pq.read_metadata(parquet_source(out / FILE_NAME)).num_rows, chunks.count_dropped(out)
    return {"rows": kept + dropped, "kept": kept, "dropped": dropped}
