"""``ches judge``: a file of responses to a run directory with ``judgments.jsonl`` and the refusal rate.

Responses are judged and written a chunk at a time, so a killed run continues where it was and ends in the same bytes.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from tqdm import tqdm

from ches_jax.data.sources import PairSource, Record
from ches_jax.distributed.chunked_run import ChunkedRun
from ches_jax.distributed.processes import start_run
from ches_jax.errors import DataError, require_config
from ches_jax.generate.config import GenerateConfig
from ches_jax.generate.prompts import IMPOSSIBLE, Encoder, open_encoder
from ches_jax.generate.run import Generator
from ches_jax.generate.stops import stop_ids
from ches_jax.inputs import Opener
from ches_jax.judges.config import JudgeConfig, checked
from ches_jax.judges.judge_prompt import default_question, fill_question, load_question, parse_answer
from ches_jax.judges.phrases import default_rules, load_rules, measured_rates, refused
from ches_jax.judges.responses import (
    asked_and_answered,
    dropped_row,
    key,
    open_responses,
    read_labels,
    require_labels,
    require_readable,
)
from ches_jax.runs import chunks
from ches_jax.runs.directory import CONFIG, as_dict, merged, read_json, write_summary
from ches_jax.runs.store import here
from ches_jax.stats import wilson

FILE_NAME = "judgments.jsonl"
Verdict = tuple[bool | None, str | None]
"""Whether the response refused (None: undecided), and what says so."""


class Method(NamedTuple):
    """How to judge: a check of all responses, and the judge of a chunk, made when it is needed."""

    check: Callable[[PairSource], None]
    start: Callable[[Mesh], Callable[[list[Record]], list[Verdict]]]


def judge(config: JudgeConfig, *, resume: bool = False, quiet: bool = False, other_versions: bool = False) -> Path:
    """Judge every response; returns the run directory.

    With several processes each judges its own chunks and ``ches merge`` joins them (``merge``); on a mesh over the
    devices of all of them they judge every batch together, and the first one writes.

    Args:
      config: the responses, and who judges them.
      resume: continue the run that ``config.out`` holds.
      quiet: no progress.
      other_versions: continue although packages have other versions than at the start.

    Raises:
      ChesError: any input that is not fit, before anything is written.

    >>> import json
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     responses = Path(folder) / "responses.jsonl"
    ...     _ = responses.write_text(json.dumps({"prompt": "How?", "text": "I cannot help."}))
    ...     out = judge(JudgeConfig(responses=str(responses), out=f"{folder}/run"), quiet=True)
    ...     json.loads((out / "run.json").read_text())["summary"]["refusals"]
    1
    """
    require_config("judge", config, JudgeConfig)
    import jax

    process = start_run(config.distributed, config.out)
    config = checked(config)
    with (
        jax.enable_x64(config.by == "model" and config.dtype == "float64"),
        ChunkedRun("judge", str(config.out), config.mesh, process) as run,
    ):
        return _judge(config, run, resume, quiet or not run.division.first, other_versions)


def _judge(config: JudgeConfig, run: ChunkedRun, resume: bool, quiet: bool, other_versions: bool) -> Path:
    opener = Opener()
    with run.opening():
        source = open_responses(opener, config.responses, config.split, config.columns)
        method = {"rules": _by_rules, "model": _by_model, "labels": _by_labels}[config.by](config, opener)
        if config.on_bad_row == "error":
            require_readable(itertools.islice(source, config.limit), source.name)
        method.check(source)
    identity = {"config": as_dict(config), **opener.identity()}
    run.agree(identity)
    run.begin(identity, resume, other_versions)
    if not run.finished:
        _judge_chunks(run, config, source, opener, method, quiet)
        run.end(_finish, {})
    return run.out


def merge(out: Path) -> Path:
    """``ches merge``: the chunks of several processes become one run.

    Raises:
      RunError: no run, a run at work, a chunk that is missing, damaged or of another run.
    """
    return merged(out, _finish)


def _finish(out: Path, facts: Mapping[str, Any]) -> None:
    """Join the chunks, write ``run.json``, and remove the chunks: until it is there they are joined again."""
    chunks.join(out, FILE_NAME)
    counts = summary(chunks.read_lines(out / FILE_NAME))
    options = read_json(out / CONFIG).get("config", {})
    by_own_rules = options.get("by") == "rules" and options.get("rules") is None
    measured = {"rules_measured": dict(measured_rates())} if by_own_rules else {}
    write_summary(out, {"summary": counts | measured, **facts})
    chunks.clear(out)


def _judge_chunks(
    run: ChunkedRun, config: JudgeConfig, source: PairSource, opener: Opener, method: Method, quiet: bool
) -> None:
    """Judge the chunks that are missing and are this process's."""

    def numbered(
        first: int, wanted: Callable[[int], bool], at_end: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Record]]]:
        start = first * config.chunk_rows
        rows = itertools.islice(source.iter_from(start), None if config.limit is None else max(config.limit - start, 0))
        return chunks.numbered(rows, config.chunk_rows, first, wanted, at_end)

    verdict = None
    begin = run.first_missing * config.chunk_rows
    with tqdm(unit=" responses", initial=begin, disable=quiet, desc=f"judging by {config.by}") as bar:
        for number, chunk in run.missing(numbered, opener.require_unchanged):
            if verdict is None:
                with run.team.sharing_errors():
                    verdict = method.start(run.mesh)
            verdicts = iter(verdict([row for row in chunk if not row.fault]))
            unread = [row for row in chunk if row.fault]
            judged = [
                _record(row, (None, row.fault) if row.fault else next(verdicts))
                for row in chunk
                if not row.fault or config.on_bad_row == "keep"
            ]
            dropped = unread if config.on_bad_row == "drop" else []
            if run.team.first:
                chunks.write(run.out, number, judged, [dropped_row(row) for row in dropped])
            bar.update(len(chunk))


def _record(row: Record, verdict: Verdict) -> dict[str, Any]:
    row_id, sample = (row.row_id, 0) if row.fault else key(row)
    more = {"category": row.category} if row.category else {}
    return {
        "row_id": row_id,
        "index": row.index,
        "sample": sample,
        "refusal": verdict[0],
        "reason": verdict[1],
        "text": row.content.get("text", ""),
        **more,
    }


def _by_rules(config: JudgeConfig, opener: Opener) -> Method:
    rules = load_rules(opener.file(Path(here(config.rules)) if config.rules else default_rules(), "rules"))

    def verdicts(chunk: list[Record]) -> list[Verdict]:
        return [refused(rules, asked_and_answered(row)[1]) for row in chunk]

    return Method(lambda source: None, lambda mesh: verdicts)


def _by_labels(config: JudgeConfig, opener: Opener) -> Method:
    assert config.labels is not None
    labels = read_labels(opener, config.labels, config.label_columns)

    def check(source: PairSource) -> None:
        if config.on_missing == "error":
            require_labels(itertools.islice(source, config.limit), labels, config.responses)

    def verdict(chunk: list[Record]) -> list[Verdict]:
        return [(labels.get(key(row)), None) for row in chunk]

    return Method(check, lambda mesh: verdict)


def _by_model(config: JudgeConfig, opener: Opener) -> Method:
    assert config.judge is not None
    path = Path(here(config.judge_template)) if config.judge_template else default_question()
    question = load_question(opener.file(path, "judge_template"))
    adapter = None if config.adapter is None else opener.adapter(config.adapter)
    encoder = open_encoder(opener, config.judge, None, "auto", config.template_args, option="judge")
    wrap = config.wrap
    if wrap == "auto":
        wrap = "inst" if encoder.tokenizer.chat_template is None else "chat"

    def prompt(row: Record) -> Record:
        if row.content.get("prompt") is None:
            raise DataError(f"{config.responses}, {row.where}: no prompt, which the judge has to see")
        text: Any = fill_question(question, *asked_and_answered(row))
        text = {"chat": [{"role": "user", "content": text}], "inst": f"[INST] {text} [/INST]", "none": text}[wrap]
        return Record(row.index, f"{key(row)[0]}/{key(row)[1]}", row.where, {"prompt": text})

    def check(source: PairSource) -> None:
        """Every question can be asked: known before the judge is loaded."""
        rows = (row for row in itertools.islice(source, config.limit) if not row.fault)
        while chunk := list(itertools.islice(rows, config.chunk_rows)):
            for query in encoder([prompt(row) for row in chunk], config.responses):
                if query.detail:
                    raise DataError(f"{config.responses}, {query.detail}")
                if IMPOSSIBLE & set(query.flags):
                    raise DataError(
                        f"{config.responses}, row {query.index}: the question to the judge is {len(query.ids)} tokens, "
                        f"and it reads {encoder.max_length}; use a judge with a longer context"
                    )

    def start(mesh: Mesh) -> Callable[[list[Record]], list[Verdict]]:
        answers = _judge_model(config, encoder, mesh, adapter, templated=wrap == "chat")

        def verdict(chunk: list[Record]) -> list[Verdict]:
            replies = answers(encoder([prompt(row) for row in chunk], config.responses))
            return [(parse_answer(row["text"]), row["text"]) for row in replies]

        return verdict

    return Method(check, start)


def _judge_model(
    config: JudgeConfig, encoder: Encoder, mesh: Mesh, adapter: Path | None, *, templated: bool
) -> Generator:
    """The judge model, which answers greedily, up to where its chat template ends an answer if that asks it."""
    how = GenerateConfig(
        temperature=0.0,
        max_new_tokens=config.max_new_tokens,
        dtype=config.dtype,
        batch_size=config.batch_size,
        chunk_rows=config.chunk_rows,
    )
    answer_end = encoder.writer.chat.answer_end() if templated else None
    ends = stop_ids(encoder.model.directory, encoder.tokenizer, (), answer_end)
    return Generator(how, encoder, ends, mesh, adapter)


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and the refusal rate of decided responses, with its 95 % Wilson interval, in all and by category."""
    groups: dict[str, Counter[bool | None]] = {"": Counter()}
    for row in rows:
        for name in {"", row.get("category") or ""}:
            groups.setdefault(name, Counter())[row["refusal"]] += 1
    total = _rates(groups.pop(""))
    return total | ({"by_category": {k: _rates(c) for k, c in sorted(groups.items())}} if groups else {})


def _rates(counts: Counter[bool | None]) -> dict[str, Any]:
    decided = counts[True] + counts[False]
    rate = counts[True] / decided if decided else None
    return {
        "responses": counts.total(),
        "refusals": counts[True],
        "undecided": counts[None],
        "refusal_rate": rate,
        "interval": None if rate is None else list(wilson(counts[True], decided)),
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary for a person."""
    lines = []
    for name, s in [("all", summary), *summary.get("by_category", {}).items()]:
        rate = "no response was decided"
        if s["refusal_rate"] is not None:
            low, high = s["interval"]
            rate = f"refusal rate {s['refusal_rate']:.1%} (95 % interval {low:.1%} to {high:.1%})"
        undecided = f", {s['undecided']} undecided" if s["undecided"] else ""
        lines.append(f"{name}: {s['responses']} responses, {s['refusals']} refusals{undecided}; {rate}")
    if rates := summary.get("rules_measured"):
        words = (f"{k} {v:.0%} [{low:.0%}, {high:.0%}]" for k in ("precision", "recall") for v, low, high in [rates[k]])
        lines.append(
            f"the rules, on {rates['answers']} labelled answers: {', '.join(words)} (95 % intervals); they read "
            f"{', '.join(rates['languages'])} and leave other languages undecided"
        )
    return "\n".join(lines)
