"""``ches score``: a model directory and a file of pairs to a run directory with the score table.

Rows are read, tokenised and audited a chunk at a time, scored, and written as one part per chunk, so memory does not
grow with the data and a killed run continues where it was. A chunk's numbers depend on its rows alone, not on when
or by which process it was computed: a resumed run ends in the same bytes.
"""

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ches_jax.data.audit import require_clean
from ches_jax.distributed.chunked_run import ChunkedRun
from ches_jax.distributed.processes import start_run
from ches_jax.errors import ChesError, require_config
from ches_jax.inputs import Inputs, Opener, audit, convention, open_model_and_pairs
from ches_jax.runs import chunks
from ches_jax.runs.directory import as_dict, merged, write_summary
from ches_jax.runs.progress import say
from ches_jax.scores import parts
from ches_jax.scores.config import ScoreConfig, with_defaults
from ches_jax.scores.forward import Outputs
from ches_jax.scores.in_memory import pair_scorer, score_chunk
from ches_jax.scores.scorer import PairScorer


def score(config: ScoreConfig, *, resume: bool = False, quiet: bool = False, other_versions: bool = False) -> Path:
    """Score every pair of a data set; returns the run directory.

    With several processes each scores its own chunks and the table is made by ``ches merge`` (``merge``); on a mesh
    over the devices of all of them they score every batch together, and the first one writes.

    Args:
      config: what to score with what.
      resume: continue the run that ``config.out`` holds.
      quiet: no progress.
      other_versions: continue although packages have other versions than at the start.

    Raises:
      ChesError: any input that is not fit, before anything is written; a score that is not finite.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     out = score(ScoreConfig(limit=2, out=f"{folder}/run"), quiet=True)
    ...     sorted(path.name for path in out.iterdir())
    ['config.json', 'run.json', 'scores.parquet']
    """
    require_config("score", config, ScoreConfig)
    import jax

    process = start_run(config.distributed, config.out)
    config = with_defaults(config)
    with (
        jax.enable_x64(config.dtype == "float64"),
        ChunkedRun("score", str(config.out), config.mesh, process) as run,
    ):
        return _score(config, run, resume, quiet or not run.division.first, other_versions)


def _score(config: ScoreConfig, run: ChunkedRun, resume: bool, quiet: bool, other_versions: bool) -> Path:
    from ches_jax.models.adapters import peft
    from ches_jax.models.attention.choose import choose_attention
    from ches_jax.models.checkpoint.load import load_model
    from ches_jax.models.sharding import placement

    opener, total = Opener(), None
    with run.opening():
        inputs = open_model_and_pairs(config, opener)
        adapter = None if config.adapter is None else opener.adapter(config.adapter)
        if config.on_bad_row == "error":
            say(f"checking {inputs.source.name}", quiet=quiet)
            # tokenised twice, so that a bad row shows now and not in hour two
            audited = audit(inputs)
            require_clean(audited, inputs.source.name)
            total = audited.rows
        attention = choose_attention(config.attention, inputs.model.decoder, config.dtype)
    for fault in attention.rejected:
        print(f"ches: attention in plain jax: {fault}", file=sys.stderr)
    identity = {"config": as_dict(config), **opener.identity()}
    run.agree({**identity, "attention": attention.name})
    load = load_model if adapter is None else partial(peft.load_adapted, adapter=adapter)
    say(f"loading the model ({inputs.model.directory})", quiet=quiet)
    with run.team.sharing_errors():
        model = load(
            inputs.model.directory, dtype=config.dtype, param_dtype=config.param_dtype, sharding=placement(run.mesh)
        )
    run.begin(identity, resume, other_versions)
    if run.finished:
        return run.out
    metadata = _metadata(identity, model.config.family, run.versions)
    outputs = Outputs(logps=config.logps, head_score=config.by == "head_score", token_scores=config.token_scores)
    assert config.batch_tokens is not None
    scorer = pair_scorer(
        model,
        run.mesh,
        outputs,
        attention.attend,
        batch_tokens=config.batch_tokens,
        eos=config.eos,
        gradients=config.gradients,
    )
    say("compiling, then scoring", quiet=quiet)
    started, compiled = time.perf_counter(), scorer.run.compile_seconds
    scored = _score_chunks(run, inputs, opener, config, scorer, metadata, total, quiet)
    seconds = time.perf_counter() - started - (scorer.run.compile_seconds - compiled)
    facts = {
        "attention": attention.name,
        "scored_this_time": scored,
        "seconds": {"scoring": round(seconds, 3), "compiling": round(scorer.run.compile_seconds, 3)},
        "pairs_per_second": round(scored / max(seconds, 1e-9), 2),
        "compiled_shapes": [list(s) for s in scorer.run.shapes],
        "batch_tokens": scorer.batching.batch_tokens,
        "padding_waste": round(scorer.waste, 4),
        "work": scorer.facts(),
        **({} if scorer.gradients is None else {"gradients": scorer.gradients.facts()}),
    }
    run.end(_finish, facts)
    return run.out


def _score_chunks(
    run: ChunkedRun,
    inputs: Inputs,
    opener: Opener,
    config: ScoreConfig,
    scorer: PairScorer,
    metadata: dict[str, Any],
    total: int | None,
    quiet: bool,
) -> int:
    """Score this process's missing chunks; returns the number of pairs scored."""
    scored = 0
    begin = sum(run.done[number] for number in range(run.first_missing))
    with tqdm(unit=" pairs", initial=begin, total=total, disable=quiet, desc="scoring", smoothing=0.1) as bar:

        def advance(pairs: int) -> None:
            bar.set_postfix({"padding": f"{scorer.waste:.0%}"}, refresh=False)
            bar.update(pairs)

        scorer.on_batch = advance
        for number, chunk in run.missing(inputs.chunks, opener.require_unchanged):
            before = bar.n
            columns, tokens, dropped = score_chunk(scorer, chunk, config.on_bad_row)
            if run.team.first:
                if tokens is not None:
                    tokens["text"] = inputs.tokenizer.tokenizer.batch_decode([[t] for t in tokens["token"]])
                parts.write(run.out, number, columns, dropped, tokens, metadata)
            scored += len(chunk) - len(dropped)
            bar.update(before + len(chunk) - bar.n)  # rows that needed no pass
    return scored


def merge(out: Path) -> Path:
    """``ches merge``: the parts of several processes become one run; every row must be there once.

    Raises:
      RunError: no run, a run at work, a part that is missing, damaged or of another run.
    """
    return merged(out, _finish)


def _finish(out: Path, facts: Mapping[str, Any]) -> None:
    """Join the parts, write ``run.json``, and remove the parts: until it is there they are joined again."""
    parts.merge(out)
    counts = parts.counts(out)
    if not counts["rows"]:
        raise ChesError(f"{out}: the pairs have no rows")
    write_summary(out, {"counts": counts, **facts})
    chunks.clear(out)


def _metadata(identity: dict[str, Any], family: str, at_start: dict[str, str]) -> dict[str, Any]:
    """Provenance of the table; without times, so that equal runs give equal bytes."""
    config = identity["config"]
    shown = {k: v for k, v in config.items() if v not in (None, {}, False)}
    named = {k: ",".join(f"{n}={w}" for n, w in v.items()) for k, v in shown.items() if isinstance(v, dict)}
    words = [f"--{k.replace('_', '-')} {named.get(k, '' if v is True else v)}".strip() for k, v in shown.items()]
    return {
        "verb": "score",
        "model": config["model"],
        "family": family,
        "pairs": config["pairs"],
        **{k: v for k, v in identity.items() if k.endswith("fingerprint")},
        "convention": convention(*(config[n] for n in ("eos", "max_length", "template", "template_args"))),
        "dtype": config["dtype"],
        "param_dtype": config["param_dtype"] or "stored",
        "accumulation": "float64" if config["dtype"] == "float64" else "float32",
        "versions": at_start,
        "command": " ".join(["ches score", *words]),
    }
