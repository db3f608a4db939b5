"""``ches score``: a model directory and a file of pairs to a run directory with the score table.

Rows are read, tokenised and audited a chunk at a time, scored, and written as one part per chunk, so memory does not
grow with the data and a killed run continues where it was. A chunk's numbers depend on its rows alone, not on when
or by which process it was computed: a resumed run ends in the same bytes.
"""

import itertools
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from tqdm import tqdm

from ches_jax.data.audit import require_clean
from ches_jax.distributed.division import Division
from ches_jax.distributed.mesh import mesh_of_run, spelled
from ches_jax.distributed.processes import part, start_processes
from ches_jax.errors import ChesError
from ches_jax.inputs import Inputs, Opener, audit, convention, open_model_and_pairs
from ches_jax.runs import chunks
from ches_jax.runs.directory import (
    RUN,
    as_dict,
    device_name,
    merged,
    open_run,
    versions,
    write_summary,
)
from ches_jax.runs.lock import RunLock
from ches_jax.runs.progress import say
from ches_jax.runs.store import output_place
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
    import jax

    process = start_processes(config.distributed)
    if process.count > 1 and config.out is None:
        raise ChesError("--distributed: give the run directory with --out")
    config = with_defaults(config)
    mesh = mesh_of_run(config.mesh)
    division = Division.on(mesh, process)
    if division.turns.count > 1:
        part()
    assert config.out is not None
    lock = RunLock(output_place(config.out), shared=division.turns.count > 1, first=division.turns.first)
    with jax.enable_x64(config.dtype == "float64"), lock:
        return _score(config, division, mesh, resume, quiet, other_versions, lock)


class _Begun(NamedTuple):
    """What a run directory holds at the start, for all of a team."""

    finished: bool
    versions: dict[str, str]
    done: dict[str, int]
    """Rows of the chunks that are done."""


def _score(
    config: ScoreConfig, division: Division, mesh: Mesh, resume: bool, quiet: bool, other_versions: bool, lock: RunLock
) -> Path:
    from ches_jax.models.adapters import peft
    from ches_jax.models.attention.choose import choose_attention
    from ches_jax.models.checkpoint.load import load_model
    from ches_jax.models.sharding import placement

    out, team, opener, total = lock.out, division.team, Opener(), None
    quiet = quiet or not division.first
    with team.sharing_errors():
        if team.first:
            lock.require_free()
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
    team.agree({**identity, "attention": attention.name, "mesh": spelled(mesh.shape), "versions": versions()})
    load = load_model if adapter is None else partial(peft.load_adapted, adapter=adapter)
    say(f"loading the model ({inputs.model.directory})", quiet=quiet)
    with team.sharing_errors():
        model = load(
            inputs.model.directory, dtype=config.dtype, param_dtype=config.param_dtype, sharding=placement(mesh)
        )
        begun = _begin(lock, identity, division, resume, other_versions) if team.first else None
    begun = _Begun(*team.exchange(begun)[0])
    if begun.finished:
        return out
    metadata = _metadata(identity, model.config.family, begun.versions)
    outputs = Outputs(logps=config.logps, head_score=config.by == "head_score", token_scores=config.token_scores)
    assert config.batch_tokens is not None
    scorer = pair_scorer(
        model,
        mesh,
        outputs,
        attention.attend,
        batch_tokens=config.batch_tokens,
        eos=config.eos,
        gradients=config.gradients,
    )
    say("compiling, then scoring", quiet=quiet)
    started, compiled = time.perf_counter(), scorer.run.compile_seconds
    scored = _score_chunks(out, inputs, opener, config, scorer, metadata, division, begun, total, quiet)
    seconds = time.perf_counter() - started - (scorer.run.compile_seconds - compiled)
    facts = {
        "device": device_name(),
        "mesh": dict(mesh.shape),
        "attention": attention.name,
        "processes": division.count,
        "scored_this_time": scored,
        "seconds": {"scoring": round(seconds, 3), "compiling": round(scorer.run.compile_seconds, 3)},
        "pairs_per_second": round(scored / max(seconds, 1e-9), 2),
        "compiled_shapes": [list(s) for s in scorer.run.shapes],
        "batch_tokens": scorer.batching.batch_tokens,
        "padding_waste": round(scorer.waste, 4),
        "work": scorer.facts(),
        **({} if scorer.gradients is None else {"gradients": scorer.gradients.facts()}),
    }
    with team.sharing_errors():
        if division.turns.count == 1 and team.first:
            _finish(out, facts)
    return out


def _begin(lock: RunLock, identity: dict[str, Any], division: Division, resume: bool, other_versions: bool) -> _Begun:
    """Take the run directory, and see what is there."""
    out = lock.out
    # the other processes join the directory that the first one makes
    lock.take()
    began = open_run(out, "score", identity, resume or division.turns.count > 1, other_versions=other_versions)
    if (out / RUN).exists():
        chunks.clear(out)
        return _Begun(True, {}, {})
    chunks.make_folders(out)
    return _Begun(False, began.get("versions") or versions(), chunks.done(out))


def _score_chunks(
    out: Path,
    inputs: Inputs,
    opener: Opener,
    config: ScoreConfig,
    scorer: PairScorer,
    metadata: dict[str, Any],
    division: Division,
    begun: _Begun,
    total: int | None,
    quiet: bool,
) -> int:
    """Score this process's missing chunks; returns the number of pairs scored."""
    done = {int(number): rows for number, rows in begun.done.items()}
    first = next(number for number in itertools.count() if number not in done)
    scored, computed, ends = 0, [], []

    def own_chunk(number: int) -> bool:
        return division.takes(number) and number not in done

    begin = sum(done[number] for number in range(first))
    with tqdm(unit=" pairs", initial=begin, total=total, disable=quiet, desc="scoring", smoothing=0.1) as bar:

        def advance(pairs: int) -> None:
            bar.set_postfix({"padding": f"{scorer.waste:.0%}"}, refresh=False)
            bar.update(pairs)

        scorer.on_batch = advance
        for number, chunk in inputs.chunks(first, own_chunk, ends.append):
            before = bar.n
            columns, tokens, dropped = score_chunk(scorer, chunk, config.on_bad_row)
            if division.team.first:
                if tokens is not None:
                    tokens["text"] = inputs.tokenizer.tokenizer.batch_decode([[t] for t in tokens["token"]])
                parts.write(out, number, columns, dropped, tokens, metadata)
            computed.append(number)
            scored += len(chunk) - len(dropped)
            bar.update(before + len(chunk) - bar.n)  # rows that needed no pass
    if division.team.first:
        chunks.end_of_data(out, ends[0], computed, opener.require_unchanged)
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
