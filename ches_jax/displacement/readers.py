"""Changes of log-probabilities from what people have: one reader for each kind of input.

read_run            the displacement log of `ches train`
read_score_tables   two tables of `ches score --logps`, before and after
read_logps          one table with log-probabilities before and after
read_trl_log        the log of TRL's DPOTrainer
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.displacement.changes import FILE_NAME, PARTS
from ches_jax.displacement.verdict import Changes
from ches_jax.errors import ChesError, RunError

LOG_TAIL = 0.1
"""Of a training log, the last tenth of its steps is the end that is compared with the start."""
SIDES = ("chosen", "rejected")


def read_run(folder: Path) -> Changes:
    """The last evaluation of a training run, finished or not: held-out pairs where there are any.

    Raises:
      RunError: no displacement log, only step 0 in it, or single responses of which no two make a pair.
    """
    import pyarrow.parquet as pq

    path = folder / FILE_NAME
    if not path.exists():
        parts = sorted((folder / PARTS).glob("step-*.parquet"))
        if not parts:
            raise RunError(f"{folder}: no {FILE_NAME}; expected a directory of `ches train`")
        path = parts[-1]
    table = pq.read_table(path)
    columns = table.to_pydict()
    step, sets = np.array(columns["step"]), np.array(columns["set"])
    last = int(step.max())
    if last == 0:
        raise RunError(f"{folder}: holds step 0 only; there is no change to judge yet")
    held_out = "held_out" in sets
    take = (step == last) & (sets == ("held_out" if held_out else "train"))
    caveats = () if held_out else ("training pairs: a run with --holdout or --eval-pairs tells more",)
    name = "held-out" if held_out else "training"
    pairs = (np.array(columns["chosen_tokens"]) > 0) & (np.array(columns["rejected_tokens"]) > 0)
    if not (take & pairs).any():
        raise RunError(
            f"{folder}: trained on single responses, of which no two make a pair; displacement/* in metrics.jsonl has "
            "the changes of good and of bad ones"
        )
    if (take & ~pairs).any():
        caveats = (*caveats, f"{(take & ~pairs).sum()} single responses are not counted")
    take &= pairs
    return Changes(
        np.array(columns["dlogp_chosen"])[take],
        np.array(columns["dlogp_rejected"])[take],
        f"{folder}, {name} pairs, update {last} against 0",
        caveats,
        np.array(columns["index"])[take] if "index" in columns else None,
    )


def read_score_tables(before: Path, after: Path) -> Changes:
    """Two score tables with log-probabilities, matched by ``row_id`` (copies of a row in their order).

    Raises:
      RunError: not score tables, without log-probabilities, scored by different rules (a change of the convention
        would look like a change of the model), or without a pair in common.
    """
    from ches_jax.scores.table import align, read_table

    tables, metadata = zip(*(read_table(folder) for folder in (before, after)), strict=True)
    for folder, table in zip((before, after), tables, strict=True):
        _require(folder, table.column_names, ("logp_chosen", "logp_rejected"))
    _require_same_rules(before, after, *metadata)
    i, j = align(*tables)
    if not len(i):
        raise RunError(f"{before} and {after} have no pair in common")
    first, second = tables[0].take(i), tables[1].take(j)
    for name in ("chosen_tokens", "rejected_tokens"):
        if name in first.column_names and name in second.column_names:
            differ = np.flatnonzero(_numbers(first, name) != _numbers(second, name))
            if differ.size:
                raise RunError(
                    f"{before} and {after} count different tokens ({name}) in {differ.size} of {len(i)} pairs, first "
                    f"in row_id {first['row_id'][int(differ[0])]}: their log-probabilities are of different events. "
                    "Score both models with the same tokenizer and options"
                )
    chosen, rejected = (_numbers(second, f"logp_{side}") - _numbers(first, f"logp_{side}") for side in SIDES)
    alone = len(tables[0]) + len(tables[1]) - 2 * len(i)
    caveats = (f"{alone} rows are in one table only",) if alone else ()
    if metadata[0].get("tokenizer_fingerprint") != metadata[1].get("tokenizer_fingerprint"):
        caveats = (*caveats, "the tokenizers differ; every response has as many tokens in both tables")
    return Changes(chosen, rejected, f"{before} to {after}", caveats, _numbers(first, "index"))


def _require_same_rules(before: Path, after: Path, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuses tables of which a response's log-probability was counted, or computed, in two ways."""
    rules = [{**m.get("convention", {}), "dtype": m.get("dtype")} for m in (one, other)]
    differ = [
        f"--{name.replace('_', '-')} is {rules[0].get(name)} and {rules[1].get(name)}"
        for name in {**rules[0], **rules[1]}
        if rules[0].get(name) != rules[1].get(name)
    ]
    if differ:
        raise RunError(
            f"{before} and {after} were scored by different rules ({'; '.join(differ)}), so their log-probabilities "
            "cannot be compared; score both models with the same options"
        )


def read_logps(path: Path) -> Changes:
    """One table with log-probabilities before (TRL's reference columns) and after."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = path / "scores.parquet" if path.is_dir() else path
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{file}: not a readable Parquet file ({error})") from None
    _require(file, table.column_names, [n for side in SIDES for n in (f"ref_{side}_logps", f"logp_{side}")])
    chosen, rejected = (_numbers(table, f"logp_{side}") - _numbers(table, f"ref_{side}_logps") for side in SIDES)
    return Changes(chosen, rejected, str(path))


def read_trl_log(path: Path, beta: float) -> Changes:
    r"""The end of a DPOTrainer's log: rewards over beta are changes since the reference, as means of batches.

    .. math:: r_\pm = \beta\, (\ln \pi(y_\pm|x) - \ln \pi_{ref}(y_\pm|x))

    Rewards of held-out batches (``eval_rewards/*``) are read where there are any, otherwise those of training batches.

    Raises:
      ChesError: not a ``trainer_state.json`` with rewards; rewards without a reference (ORPO, CPO, SimPO), which are
        log-probabilities and no changes.
    """
    if beta <= 0:
        raise ChesError(f"--beta {beta}: expected a positive number")
    path = path / "trainer_state.json" if path.is_dir() else path
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ChesError(f"{path}: not a trainer_state.json (expected an object with log_history)") from None
    logs = {prefix: [e for e in history if all(f"{prefix}rewards/{side}" in e for side in SIDES)]
            for prefix in ("eval_", "")}  # fmt: skip
    prefix = "eval_" if logs["eval_"] else ""
    entries: list[Mapping[str, Any]] = logs[prefix]
    if not entries:
        raise ChesError(f"{path}: its log_history has no rewards/chosen; expected the log of a DPOTrainer")
    if (reason := _without_reference(entries, prefix)) is not None:
        raise ChesError(
            f"{path}: {reason}, so its rewards are log-probabilities without a reference (ORPO, CPO, SimPO) and no "
            "changes; compare models instead: `ches score --logps` before and after, then --before and --after"
        )
    entries = entries[-max(1, round(LOG_TAIL * len(entries))) :]
    chosen, rejected = (np.array([e[f"{prefix}rewards/{side}"] for e in entries], float) / beta for side in SIDES)
    batches = "held-out" if prefix else "training"
    return Changes(
        chosen,
        rejected,
        f"{path}, last {len(entries)} logged {'evaluations' if prefix else 'steps'}",
        (
            f"means of {batches} batches over beta {beta:g}: what single pairs did is hidden, rates count steps",
            "steps of one run depend on each other: the intervals are the spread of steps, not of pairs",
        ),
        unit="logged evaluations" if prefix else "logged steps",
    )


def _without_reference(entries: Sequence[Mapping[str, Any]], prefix: str) -> str | None:
    """Why the rewards are no changes since a reference; None where nothing says so.

    ORPO logs an odds ratio. ORPO, CPO and SimPO log beta times ``logps/*`` as rewards, in every entry.
    """
    odds = [name for name in (f"{prefix}log_odds_ratio", f"{prefix}log_odds_chosen") if name in entries[0]]
    if odds:
        return f"it logs {odds[0]}"
    names = [f"{prefix}logps/{side}" for side in SIDES]
    if not all(name in entry for entry in entries for name in names):
        return None
    logps = np.array([[e[name] for name in names] for e in entries], float)
    rewards = np.array([[e[f"{prefix}rewards/{side}"] for side in SIDES] for e in entries], float)
    factor = (rewards * logps).sum() / (logps * logps).sum() if (logps * logps).sum() > 0 else 0.0
    if factor > 0 and np.allclose(rewards, factor * logps, rtol=0.01, atol=1e-4):
        return f"its rewards are {factor:.3g} times its logps"
    return None


def _require(file: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    missing = [n for n in names if n not in columns]
    if missing:
        raise RunError(f"{file}: no column {', '.join(missing)}; score with --logps")


def _numbers(table: Any, name: str) -> np.ndarray:
    """A column as an array; null is NaN."""
    return table[name].to_numpy()
