"""Which file of a directory is the log of its run; two runs in one directory are refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ches_jax.displacement.readers.csv_log import looks_like_csv, read_csv_log
from ches_jax.displacement.readers.event_log import is_event_file, read_event_log
from ches_jax.displacement.readers.json_log import ONE_ENTRY, read_json_log
from ches_jax.displacement.readers.log import Log
from ches_jax.errors import ChesError

STATE = "trainer_state.json"
DEPTH = 4
"""Folders below the one that is named in which logs are looked for."""
SUFFIXES = {".json", ".jsonl", ".csv", ".log", ".txt", ".out"}
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
}
"""Files of a run's directory that are no logs."""
LARGEST = 200_000_000
"""Bytes; a log is never larger, a data set may be."""


def read_log(path: Path, held_out: str | None = None) -> Log:
    """The log of one run, from a file of any format or a directory.

    Raises:
      ChesError: no log; logs of two runs; a log that cannot be read.
    """
    if not path.exists():
        raise ChesError(f"{path}: no such file or directory")
    if path.is_file():
        return read_file(path, held_out)
    if states := _states(path):
        return read_file(_newest(path, states), held_out)
    if events := _event_files(path):
        return _of_one_run(path, events, held_out)
    logs, others, problems = [], [], []
    for file in _candidates(path):
        try:
            log = read_file(file, held_out)
        except ChesError as error:
            problems.append(str(error))
            continue
        if any(quantity in ("chosen", "dlogp_chosen") for _, quantity in log.series):
            logs.append((file, log))
        elif log.names:
            others.append(log)
            problems.append(f"{file}: no rewards/chosen (it has {', '.join(log.names[:6])})")
    logs = _without_copies(logs)
    if len(logs) > 1:
        raise ChesError(_several(path, [file for file, _ in logs]))
    if logs:
        return logs[0][1]
    if len(others) == 1:
        return others[0]  # what it lacks is reported where its metrics are read
    looked = "trainer_state.json, JSON lines, CSV, TensorBoard's event files"
    more = "".join(f"\n  {problem}" for problem in problems[:5])
    raise ChesError(f"{path}: no log with rewards of chosen and rejected responses in it (looked for {looked}){more}")


def _without_copies(logs: list[tuple[Path, Log]]) -> list[tuple[Path, Log]]:
    """One log of those that are of one run: a summary beside a history, and a history in two formats."""
    whole = [(file, log) for file, log in logs if not log.source.endswith(f"({ONE_ENTRY})")] or logs
    longest = max(whole, key=lambda item: sum(len(s.steps) for s in item[1].series.values()), default=None)
    if longest is None or not all(item is longest or _is_copy(item, longest) for item in whole):
        return whole
    return [longest]


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


def read_file(path: Path, held_out: str | None = None) -> Log:
    """The log in a file; its content says which format it is."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        if not head:
            raise ChesError(f"{path}: is empty")
        if is_event_file(head):
            return read_event_log([path], held_out)
        if path.stat().st_size > LARGEST:
            raise ChesError(f"{path}: {path.stat().st_size / 1e6:.0f} MB are too large for a log")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ChesError(f"{path}: not a text file, and none of TensorBoard's event files") from None
    except OSError as error:
        raise ChesError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return (read_csv_log if looks_like_csv(text) else read_json_log)(path, text, held_out)
    except RecursionError:
        raise ChesError(f"{path}: nested too deeply for a log") from None


def _below(path: Path) -> list[Path]:
    files, level = [], [path]
    for _ in range(DEPTH):
        inside = sorted(p for folder in level for p in folder.iterdir())
        files += [p for p in inside if p.is_file()]
        level = [p for p in inside if p.is_dir() and not p.is_symlink()]
    return files


def _states(path: Path) -> list[Path]:
    return [file for file in _below(path) if file.name == STATE]


def _run_of(state: Path) -> Path:
    """The directory of the run that a state belongs to: above its checkpoint's folder."""
    return state.parent.parent if state.parent.name.startswith("checkpoint") else state.parent


def _newest(path: Path, states: Sequence[Path]) -> Path:
    runs = sorted({_run_of(state) for state in states})
    if path.name.startswith("checkpoint") and (path / STATE) in states:
        return path / STATE
    if len(runs) > 1:
        raise ChesError(_several(path, runs))
    by_step: list[tuple[int, int, Path, dict[int, object]]] = []
    for state in states:
        try:
            content = json.loads(state.read_text(encoding="utf-8"))
            history = {int(e["step"]): e.get("loss") for e in content["log_history"] if "loss" in e}
            by_step.append((int(content.get("global_step") or 0), -len(state.parts), state, history))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
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


def _of_one_run(path: Path, events: Sequence[Path], held_out: str | None) -> Log:
    folders = {file.parent: None for file in events}
    # writers of train and eval metrics keep them in folders of those names beside each other
    runs = {f.parent if f.name in ("train", "eval", "validation", "val") else f: None for f in folders}
    if len(runs) > 1:
        raise ChesError(_several(path, [*runs]))
    return read_event_log(list(events), held_out)


def _candidates(path: Path) -> list[Path]:
    return [
        file
        for file in _below(path)
        if file.suffix.lower() in SUFFIXES and file.name not in SKIPPED and file.stat().st_size <= LARGEST
    ]


def _several(path: Path, runs: Sequence[Path]) -> str:
    listed = "".join(f"\n  {run}" for run in runs)
    return f"{path}: holds {len(runs)} runs; give one of them:{listed}"
