"""The score table: its columns, its provenance, and how it is written and read.

``scores.parquet`` holds one row per pair in input order; its schema metadata tells under the key
``ches_jax`` (JSON) how the numbers came to be. Tables join by ``row_id``, never by position.
"""

import pyarrow as pa

COLUMNS: dict[str, pa.DataType] = {
    "row_id": pa.string(),
    "index": pa.int64(),
    "ches": pa.float64(),
    "ln_ches": pa.float64(),
    "head_score": pa.float64(),
    "last_hidden_inner": pa.float64(),
    "cosine": pa.float64(),
    "edit_distance": pa.float64(),
    "inner": pa.float64(),
    "sqnorm_chosen": pa.float64(),
    "sqnorm_rejected": pa.float64(),
    "chosen_tokens": pa.int32(),
    "rejected_tokens": pa.int32(),
    "prompt_tokens": pa.int32(),
    "shared_prefix_tokens": pa.int32(),
    "logp_chosen": pa.float64(),
    "logp_rejected": pa.float64(),
    "flags": pa.list_(pa.string()),
    "category": pa.string(),
}
"""Every column a table can have. ``head_score``, ``logp_*`` and ``category`` are there when asked or known;
the scores of a row that could not be scored (kept with a flag) are null."""
