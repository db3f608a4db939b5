"""Valid run directories of every kind, small: what the harness of run directories damages."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.cli.recipe import RECORD
from ches_jax.data.sources import open_pairs
from ches_jax.displacement.changes import Changes
from ches_jax.displacement.diagnose import RESULT
from ches_jax.displacement.verdict import diagnose_changes
from ches_jax.distributed.mesh import make_mesh
from ches_jax.forecast.stages import kept
from ches_jax.runs import chunks
from ches_jax.runs.directory import open_run, write_json, write_summary
from ches_jax.scores.parts import TOKEN_SCHEMA, TOKENS, part
from ches_jax.scores.table import FILE_NAME, write_part
from ches_jax.select.config import SelectConfig
from ches_jax.select.run import select
from ches_jax.train.reference import cache_key, write_cache
from ches_jax.types import Response, TokenPair

PAIRS = 6
REFERENCED = [
    TokenPair(row_id=f"row{i}", index=i, prompt=(1,), chosen=Response((2,), 3), rejected=Response((4,), 3))
    for i in range(2)
]
"""What a run that is resumed finds its reference and its step 0 of."""


def _rows(folder: Path) -> list[dict]:
    rows = [
        {"prompt": f"Q{i}", "chosen": f"a{i}", "rejected": "b", "category": "cd"[i % 2], "score": i}
        for i in range(PAIRS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _scores(ids: list[str], first: int = 0) -> dict:
    n = len(ids)
    rng = np.random.default_rng(first)
    return {
        "row_id": ids,
        "index": np.arange(first, first + n),
        "category": ["c", "d"] * (n // 2),
        "flags": [[]] * n,
        "ches": rng.normal(size=n),
        "ln_ches": rng.normal(size=n),
        "edit_distance": rng.uniform(size=n),
        "chosen_tokens": np.full(n, 3),
        "rejected_tokens": np.full(n, 2),
        "logp_chosen": rng.normal(size=n) - 5,
        "logp_rejected": rng.normal(size=n) - 6,
    }


def write_runs(folder: Path) -> None:
    """A directory for each kind of run, under its name."""
    score = folder / "score"
    score.mkdir()
    _rows(score)
    ids = [record.row_id for record in open_pairs(str(score / "pairs.jsonl"))]
    identity = {"config": {"model": "bundled", "pairs": "pairs.jsonl", "limit": None}, "data_fingerprint": "f"}
    run = folder / "made"
    open_run(run, "score", identity, resume=False)
    write_summary(run, {"counts": {"rows": PAIRS, "kept": PAIRS, "dropped": 0}, "device": "cpu"})
    for path in run.iterdir():
        path.rename(score / path.name)
    run.rmdir()
    convention = {"convention": {"eos": "include", "max_length": None, "template": "auto"}, "dtype": "float32"}
    write_part(score / FILE_NAME, _scores(ids), convention)
    (score / "dropped.jsonl").write_text(
        json.dumps({"row_id": "x", "index": 9, "reasons": ["too_long"], "detail": {}}) + "\n"
    )
    tokens = {
        "row_id": ids[:2],
        "index": [0, 1],
        "response": ["chosen", "rejected"],
        "position": [0, 0],
        "token": [1, 2],
        "text": ["a", "b"],
        "ches": [1.0, 2.0],
        "head_score": [0.0, 1.0],
        "nthr": [0.0, 1.0],
        "logp": [-1.0, -2.0],
        "chosen_candidate": [None] * 2,
        "rejected_candidate": [None] * 2,
    }
    pq.write_table(pa.table(tokens, schema=TOKEN_SCHEMA), score / TOKENS)

    parts = folder / "parts"
    open_run(parts, "score", identity, resume=False)
    for number in range(2):
        some = ids[3 * number : 3 * number + 3]
        write_part(part(parts, number), {k: v[:3] for k, v in _scores([*some, "x"], 3 * number).items()}, {})
        dropped = chunks.write_dropped(parts, number, [{"row_id": "d", "index": 7 + number, "reasons": ["too_long"]}])
        chunks.commit(parts, number, 4, [*dropped, part(parts, number)])
    chunks.end(parts, 2)

    kept = select(
        SelectConfig(
            scores=score, by="ches", keep="lowest:0.5", out=folder / "selection", pairs=str(score / "pairs.jsonl")
        )
    )
    assert kept["counts"]["kept"] == PAIRS // 2

    train = folder / "train"
    open_run(train, "train", {"config": {"pairs": "bundled", "loss": "dpo", "beta": 0.1}}, resume=False)
    write_summary(train, {"status": "done", "counts": {"updates": 2}, "displacement": {"margin": 1.0}})
    tables = []
    for step in (0, 1, 2):
        for name in ("train", "held_out"):
            down = -float(step) * np.ones(PAIRS)
            tables.append(
                pa.table(
                    {
                        "step": pa.array([step] * PAIRS, pa.int32()),
                        "set": [name] * PAIRS,
                        "row_id": ids,
                        "index": [*range(PAIRS)],
                        "dlogp_chosen": down,
                        "dlogp_rejected": 2 * down,
                        "margin": -down,
                        "regime": ["both_down_margin_up"] * PAIRS,
                        "chosen_tokens": [3] * PAIRS,
                        "rejected_tokens": [2] * PAIRS,
                    }
                )
            )
    pq.write_table(pa.concat_tables(tables), train / "displacement.parquet")
    lines = [{"step": s, "loss": 0.7, "eval_loss": 0.69, "learning_rate": 1e-4} for s in (0, 1, 2)]
    (train / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    responses = folder / "responses"
    open_run(responses, "generate", {"config": {"model": "bundled", "prompts": "bundled"}}, resume=False)
    texts = [
        {
            "row_id": row,
            "index": i,
            "sample": 0,
            "prompt": "p",
            "text": "I cannot.",
            "logp": -2.0,
            "finish_reason": "stop",
            "token_ids": [4, 5],
            "prompt_ids": [1],
            "category": "c",
        }
        for i, row in enumerate(ids)
    ]
    (responses / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    write_summary(responses, {"counts": {"prompts": PAIRS, "texts": PAIRS}, "finish_reasons": {"stop": PAIRS}})

    judgments = folder / "judgments"
    open_run(judgments, "judge", {"config": {"responses": "r", "by": "rules"}}, resume=False)
    judged = [
        {"row_id": row, "index": i, "sample": 0, "refusal": i % 2 == 0, "reason": None, "text": "x", "category": "c"}
        for i, row in enumerate(ids)
    ]
    (judgments / "judgments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    write_summary(
        judgments,
        {
            "summary": {
                "responses": 6,
                "refusals": 3,
                "refusal_rate": 0.5,
                "interval": [0.2, 0.8],
                "by_category": {"c": {"refusal_rate": 0.5, "interval": [0.2, 0.8]}},
            }
        },
    )

    answer = folder / "diagnosis"
    answer.mkdir()
    rng = np.random.default_rng(1)
    found = diagnose_changes(
        Changes(rng.normal(-1, 1, 30), rng.normal(-3, 1, 30), "a run", rows={"row_id": np.array(ids * 5)})
    )
    write_json(answer / RESULT, found.to_json())
    pairs = {
        "row_id": ids,
        "index": [*range(PAIRS)],
        "set": ["held_out"] * PAIRS,
        "dlogp_chosen": rng.normal(size=PAIRS),
        "dlogp_rejected": rng.normal(size=PAIRS),
        "dmargin": [1.0] * PAIRS,
        "regime": ["flat"] * PAIRS,
        "chosen_tokens": [3] * PAIRS,
        "prompt": ["p"] * PAIRS,
        "chosen": ["a"] * PAIRS,
        "rejected": ["b"] * PAIRS,
    }
    pq.write_table(pa.table(pairs), answer / "pairs.parquet")
    _resumed(folder / "resumed")


def _resumed(run: Path) -> None:
    """What commands that are resumed read of a run that was not finished."""
    key = f"reference-{cache_key({})}"
    for place, pair in ((run / f"{key}.parquet", REFERENCED[0]), (run / f".{key}.parts/000000.parquet", REFERENCED[1])):
        write_cache(place, {pair.row_id: (1.0, 1.0)}, {})
    log = {"set": ["train"] * 2, "row_id": [p.row_id for p in REFERENCED], "logp_chosen": [-1.0] * 2}
    (run / "displacement").mkdir()
    pq.write_table(pa.table({**log, "logp_rejected": [-2.0] * 2}), run / "displacement" / "step-00000000.parquet")
    (run / "a.toml").write_text('[[stage]]\nname = "a"\nverb = "report"\npath = "x"\n')
    (run / "out").mkdir()
    done = {"1-a": {"words": ["report", "x", "--out", str(run / "out" / "1-a")], "headline": "done"}}
    write_json(run / "out" / RECORD, {"verb": "recipe", "done": done})
    nothing_known(run)


def nothing_known(run: Path) -> None:
    """The direction of a forecast, found in a run or computed."""
    kept(run, make_mesh("data=1"), lambda: ({"norm.scale": jnp.ones(2)}, {"slopes": [1.0]}))
