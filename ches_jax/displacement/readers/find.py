"""Which file of a directory is the log of its run; two runs in one directory are refused."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ches_jax.displacement.readers.csv_log import looks_like_csv, read_csv_log
from ches_jax.displacement.readers.event_log import is_event_file, read_event_log
from ches_jax.displacement.readers.json_log import ONE_ENTRY, read_json_log
from ches_jax.displacement.readers.log import MOST_BYTES, Log, NotALogError, joined, read_whole
from ches_jax.displacement.readers.log_order import SIDES
from ches_jax.displacement.readers.metric_names import HELD_OUT
from ches_jax.displacement.readers.tracker_log import DATABASE, read_run_folders, read_tracker_log
from ches_jax.displacement.readers.wandb_journal import MAGIC, parts_of_runs, read_wandb_journal
from ches_jax.errors import ChesError

STATE = "trainer_state.json"
DEPTH = 4
"""Folders below the one that is named in which logs are looked for."""
SUFFIXES = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".log", ".txt", ".out", ".db", ".wandb", ".gz"}
SKIPPED = {
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "adapter_config.json",
    "vocab.json",
    "model.safetensors.index.json",
    "added_tokens.json",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "run.json",
    "dropped.jsonl",
    "args.json",
    "training_args.json",
    "wandb-metadata.json",
    "debug.log",
    "debug-internal.log",
    "debug-core.log",
}
"""Files of a run's directory that are no logs."""
CHECKPOINT = re.compile(
    r"^(checkpoint|ckpt|global_step|step|epoch|iter)[-_]?\d*$|^(best|last|final)([-_](model|checkpoint|ckpt))?$"
    r"|^(tmp-)?checkpoint|[-_]checkpoint$"
)
"""Names of the folders of a run's checkpoints."""
EVALUATION = {"eval", "evaluation", "val", "validation"}
"""Words in the name of a file, by which metrics without a word for their set are those of evaluations."""
JOURNAL = ".wandb"
BINARY = {b"PK\x03\x04": "a zip archive; unpack it first"}
"""First bytes -> what to do with a file that is no text."""
GZIP = b"\x1f\x8b"
OF_PAIRS = (*SIDES, "logp_chosen", "logp_rejected")


def read_log(path: Path, held_out: str | None = None) -> Log:
    """The log of one run, from a file of any format or a directory.

    Raises:
      ChesError: no log; logs of two runs; a log that cannot be read.
    """
    if not path.exists():
        raise ChesError(f"{path}: no such file or directory")
    if path.is_file():
        log = read_file(path, held_out)
        return _of_evaluations(path, log) if _words(path.stem) & EVALUATION else log
    if not path.is_dir():
        raise ChesError(f"{path}: a pipe or a device; expected a file or a directory")
    if states := _states(path):
        return read_file(_newest(path, states), held_out)
    if events := _event_files(path):
        return _one_run(path, _logs_of_events(events, held_out))
    if log := read_run_folders(path, held_out):
        return log
    logs, problems = [], []
    for before, file in _with_earlier_parts(_candidates(path)):
        try:
            log = read_file(file, held_out, before)
        except NotALogError as error:
            problems.append(error)
        except ChesError as error:  # a log that says what is wrong with it
            problems.insert(0, error)
        else:
            logs += [(file, log)] if log.names else []
    if any(quantity in SIDES for _, log in logs for _, quantity in log.series):
        of_pairs = [(file, log) for file, log in logs if any(q in OF_PAIRS for _, q in log.series)]
        # what was printed, and the summary, lie beside the journal of a run
        return _one_run(path, [item for item in of_pairs if item[0].suffix == JOURNAL] or of_pairs)
    if len(logs) == 1:
        return logs[0][1]  # what it lacks is reported where its metrics are read
    if not logs and len(of_logs := [p for p in problems if not isinstance(p, NotALogError)]) == 1:
        raise of_logs[0]
    looked = "trainer_state.json, JSON lines, CSV, TensorBoard's event files, runs of trackio and MLflow"
    problems += [f"{file}: no rewards/chosen (it has {', '.join(log.names[:6])})" for file, log in logs]
    more = "".join(f"\n  {problem}" for problem in problems[:5])
    raise ChesError(f"{path}: no log with rewards of chosen and rejected responses in it (looked for {looked}){more}")


def _one_run(path: Path, logs: list[tuple[Path, Log]]) -> Log:
    """The log of which all of these are parts, or copies.

    Parts are files of different metrics (a chart each, training and evaluation apart), and of one run that was resumed
    where the other ended.
    """
    whole = [(file, log) for file, log in logs if not log.source.endswith(f"({ONE_ENTRY})")] or logs
    longest = max(whole, key=lambda item: sum(len(s.steps) for s in item[1].series.values()))
    if all(item is longest or _is_copy(item, longest) for item in whole):
        return _of_evaluations(*longest) if _words(longest[0].stem) & EVALUATION else longest[1]
    named = [bool((_words(file.stem) | _words(file.relative_to(path).parent.name)) & HELD_OUT) for file, _ in whole]
    if not all(named):
        whole = [(f, _of_evaluations(f, log) if held else log) for (f, log), held in zip(whole, named, strict=True)]
    merged = joined(f"{path} ({len(whole)} files)", [log for _, log in whole])
    if merged is None:
        raise ChesError(_several(path, [file for file, _ in whole]))
    return merged


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _of_evaluations(file: Path, log: Log) -> Log:
    """A log that its file's name calls one of evaluations, where the metrics in it do not say of what they are."""
    if any(name == "held_out" for name, _ in log.series):
        return log
    series = {("held_out", quantity): found for (_, quantity), found in log.series.items()}
    return replace(log, series=series, notes=(*log.notes, f"{file.name} is taken as evaluations, as its name says"))


def _is_copy(one: tuple[Path, Log], other: tuple[Path, Log]) -> bool:
    """Whether two logs of different formats have the same values at the same steps."""
    series, others = one[1].series, other[1].series
    common = series.keys() & others.keys()
    return (
        one[0].suffix != other[0].suffix
        and bool(common)
        and all(
            np.isin(series[k].steps, others[k].steps).all()
            and np.allclose(
                series[k].values, others[k].values[np.isin(others[k].steps, series[k].steps)], rtol=1e-3, atol=1e-6
            )
            for k in common
        )
    )


def _with_earlier_parts(files: Sequence[Path]) -> Iterator[tuple[Sequence[Path], Path]]:
    """The files that may be logs, each with those that hold what its run was before it was resumed."""
    parts = {run[-1]: run[:-1] for run in parts_of_runs(file for file in files if file.suffix == JOURNAL)}
    earlier = {file for before in parts.values() for file in before}
    return ((parts.get(file, ()), file) for file in files if file not in earlier)


def read_file(path: Path, held_out: str | None = None, before: Sequence[Path] = ()) -> Log:
    """The log in a file; its content says which format it is.

    Args:
      path: the file.
      held_out: the name of the evaluation set, where there are several.
      before: of a journal, those of its run before it was resumed.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        if not head:
            raise NotALogError(f"{path}: is empty")
        if is_event_file(head):
            return read_event_log([path], held_out)
        if head.startswith(DATABASE):
            return read_tracker_log(path, held_out)
        if head.startswith(MAGIC):
            return read_wandb_journal([*before, path], held_out)
        if what := next((words for start, words in BINARY.items() if head.startswith(start)), None):
            raise NotALogError(f"{path}: {what}")
        content = _unpacked(path) if head.startswith(GZIP) else read_whole(path)
        text = content.decode(_encoding(content[:4096]))
    except UnicodeDecodeError:
        raise NotALogError(f"{path}: not a text file, and none of TensorBoard's event files") from None
    except OSError as error:
        raise ChesError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return (read_csv_log if looks_like_csv(text) else read_json_log)(path, text, held_out)
    except RecursionError:
        raise ChesError(f"{path}: nested too deeply for a log") from None


def _unpacked(path: Path) -> bytes:
    """What a gzip file holds, never more than a log may."""
    try:
        with gzip.open(path) as file:
            content = file.read(MOST_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise NotALogError(f"{path}: cut off or damaged, gzip cannot unpack it ({error})") from None
    if len(content) > MOST_BYTES:
        raise NotALogError(f"{path}: unpacks to more than {MOST_BYTES / 1e6:.0f} MB, which is too large for a log")
    return content


def _encoding(head: bytes) -> str:
    r"""UTF-8, or the UTF-16 that a Windows shell writes when it redirects what a trainer prints.

    >>> _encoding("{'loss'".encode("utf-16")), _encoding(b"\xff\xfe\x00\x01")
    ('utf-16', 'utf-8-sig')
    """
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and len(head) > 3
    return "utf-16" if wide and min(head[2:4]) == 0 and 32 <= max(head[2:4]) < 127 else "utf-8-sig"


def _below(path: Path) -> list[Path]:
    files, level = [], [path]
    for _ in range(DEPTH):
        try:
            inside = sorted(p for folder in level for p in folder.iterdir())
        except OSError as error:
            raise ChesError(f"{error.filename}: cannot be read ({error.strerror})") from None
        files += [p for p in inside if p.is_file()]
        level = [p for p in inside if p.is_dir() and not p.is_symlink()]
    return files


def _states(path: Path) -> list[Path]:
    return [file for file in _below(path) if file.name == STATE]


def _run_of(state: Path) -> Path:
    """The directory of the run that a state belongs to: above its checkpoint's folder."""
    return state.parent.parent if CHECKPOINT.search(state.parent.name.lower()) else state.parent


def _newest(path: Path, states: Sequence[Path]) -> Path:
    runs = sorted({_run_of(state) for state in states})
    if CHECKPOINT.search(path.name.lower()) and (path / STATE) in states:
        return path / STATE
    if len(runs) > 1:
        raise ChesError(_several(path, runs))
    by_step: list[tuple[int, int, Path, dict[int, object]]] = []
    for state in states:
        try:
            content = json.loads(read_whole(state).decode())
            history = {int(e["step"]): e.get("loss") for e in content["log_history"] if "loss" in e}
            by_step.append((int(content.get("global_step") or 0), -len(state.parts), state, history))
        except (NotALogError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if len(states) == 1:
                return state  # its reader says what is wrong
    if not by_step:
        return states[0]
    *others, newest = sorted(by_step, key=lambda item: item[:2])
    for _, _, state, history in others:
        common = history.keys() & newest[3].keys()
        if any(history[s] != newest[3][s] for s in common):
            raise ChesError(
                f"{path}: two runs in one directory: {newest[2]} and {state} have other losses at the same steps; give "
                "the file of one"
            )
    return newest[2]


def _event_files(path: Path) -> list[Path]:
    return [file for file in _below(path) if "tfevents" in file.name]


def _logs_of_events(events: Sequence[Path], held_out: str | None) -> list[tuple[Path, Log]]:
    """A log for each folder: writers of train and eval metrics, and of hyper-parameters, keep folders of their own."""
    folders = dict.fromkeys(file.parent for file in events)
    logs = [(folder, read_event_log([e for e in events if e.parent == folder], held_out)) for folder in folders]
    return [(folder, log) for folder, log in logs if log.series] or logs[:1]


def _candidates(path: Path) -> list[Path]:
    return [
        file
        for file in _below(path)
        if file.suffix.lower() in SUFFIXES and file.name not in SKIPPED and file.stat().st_size <= MOST_BYTES
    ]


def _several(path: Path, runs: Sequence[Path]) -> str:
    listed = "".join(f"\n  {run}" for run in runs)
    return f"{path}: holds {len(runs)} runs; give one of them:{listed}"
