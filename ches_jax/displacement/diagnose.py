"""``ches diagnose``: did likelihood displacement happen, was it harm, which pairs, and what to do?"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.displacement.advice import advice
from ches_jax.displacement.breakdown import breakdown
from ches_jax.displacement.calibration import calibration
from ches_jax.displacement.changes import Changes
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.evidence import Harm, judged_criterion, margin_criterion, text_criteria
from ches_jax.displacement.intervals import Interval, of_pairs
from ches_jax.displacement.log_changes import log_changes
from ches_jax.displacement.models import Models, changes_between_models, generated_and_judged
from ches_jax.displacement.on_policy import OnPolicy, mean_tokens, prompts_of, rows_of, split, write_sampled_pairs
from ches_jax.displacement.ranking import Ranking, ranking
from ches_jax.displacement.readers.find import read_log
from ches_jax.displacement.readers.log import Log, log_of
from ches_jax.displacement.readers.log_order import SIDES
from ches_jax.displacement.readers.metric_names import metric
from ches_jax.displacement.readers.run_settings import find_settings
from ches_jax.displacement.verdict import Diagnosis, diagnose_changes
from ches_jax.errors import ChesError, RunError, require_config
from ches_jax.face import make_callable
from ches_jax.runs.arrow import python_rows
from ches_jax.runs.directory import CONFIG, require_no_other
from ches_jax.runs.files import read_json, read_parquet, remove_leftovers, staged
from ches_jax.runs.store import here, is_address, is_there, output_place, place

make_callable(__name__)
RESULT = "diagnosis.json"
TABLE = "scores.parquet"
SOURCES = "PATH (a log or the directory of a run), --before with --after (models or score tables), --logps FILE"


def diagnose(config: DiagnoseConfig, *, quiet: bool = True) -> Diagnosis:
    """The verdict on a training log, a run, two models, two score tables or a table of log-probabilities.

    Args:
      config: the source, and what is compared with it.
      quiet: no progress, where a source has to be scored first.

    Raises:
      ChesError: no source or several; a source without the numbers that are needed.
      Followed: with ``distributed``, in all processes but the first (``distributed.lead``).

    >>> from tempfile import TemporaryDirectory
    >>> from ches_jax import TrainConfig, train
    >>> with TemporaryDirectory() as folder:
    ...     small = {"limit": 8, "holdout": 0, "batch_size": 4, "steps": 1, "mesh": "data=1", "export": False}
    ...     run = train(TrainConfig(**small, lr=1e-9, out=f"{folder}/run"), quiet=True)
    ...     diagnose(DiagnoseConfig(path=str(run))).to_json()["verdict"]
    'not_displaced'
    """
    require_config("diagnose", config, DiagnoseConfig)
    if (config.responses_before is None) != (config.responses_after is None):
        raise ChesError("--responses-before and --responses-after go together")
    if config.out is not None:
        require_no_other(output_place(config.out), RESULT, "this diagnosis")
    if not 0 <= config.tolerance < np.inf:
        raise ChesError(f"--tolerance {config.tolerance}: expected nats, 0 or more")
    if config.beta is not None and not 0 < config.beta < np.inf:
        raise ChesError(f"--beta {config.beta}: expected a positive number")
    if config.label_noise is not None and not 0 < config.label_noise < 1:
        raise ChesError(f"--label-noise {config.label_noise}: expected a share between 0 and 1")
    if config.distributed == "off":
        return _diagnose_into(config, Models.here(config.mesh, quiet))
    from ches_jax.displacement.together import together

    return together(config, quiet, lambda models: _diagnose_into(config, models))


def _diagnose_into(config: DiagnoseConfig, models: Models) -> Diagnosis:
    """The diagnosis, in --out where that is given."""
    if config.out is None:
        return _diagnose(_with_copies(config), models)
    with staged(output_place(config.out), RESULT) as out:
        return _diagnose(_with_copies(replace(config, out=str(out))), models)


def _with_copies(config: DiagnoseConfig) -> DiagnoseConfig:
    """The config with the runs, tables and logs that lie in stores as copies here; models stay there."""
    every = {name: getattr(config, name) for name in ("path", "logps", "responses_before", "responses_after")}
    sides = {name: _copied_table(getattr(config, name)) for name in ("before", "after")}
    several = {name: tuple(here(s, RunError) for s in getattr(config, name)) for name in ("scores", "judgments")}
    sides = {name: spec and _run_of_table(spec) for name, spec in sides.items()}
    return replace(config, **{n: v and here(v, RunError) for n, v in every.items()}, **sides, **several)


def _run_of_table(spec: str) -> str:
    """The run of a score table that lies in one: it tells the pairs, by whose prompts intervals are made."""
    path = Path(spec)
    return str(path.parent) if path.name == TABLE and path.is_file() and (path.parent / CONFIG).is_file() else spec


def _copied_table(spec: str | None) -> str | None:
    """A copy of a score table; a model or an adapter in a store is left where it is."""
    if spec is None or not is_address(spec):
        return spec
    is_table = spec.endswith(".parquet") or is_there(place(spec, RunError) / TABLE)
    return here(spec, RunError) if is_table else spec


def _diagnose(config: DiagnoseConfig, models: Models) -> Diagnosis:
    with _work(config) as work:
        changes = read_changes(config, work, models)
        _require_own_place(config, changes.source)
        if config.on_policy and changes.unit != "pairs":
            raise ChesError("--on-policy needs pairs: means of batches in a log do not say which responses were drawn")
        answers = None
        if config.generate is not None:
            config, answers = _with_texts(config, work, models)
        texts: Mapping[str, Any] = {}
        if changes.unit == "pairs" and changes.rows is not None and "row_id" in changes.rows:
            texts = _texts(config)
            changes = _with_source(changes, texts)
        diagnosis = diagnose_changes(changes, config.tolerance)
        diagnosis = replace(diagnosis, harm=_harm(config, diagnosis))
        if changes.unit == "pairs":
            diagnosis = _with_pairs(config, changes, diagnosis, texts)
            beta = config.beta if config.beta is not None else _beta_of_run(config)
            diagnosis = replace(
                diagnosis,
                parts=breakdown(changes, config.tolerance),
                calibration=None if beta is None else calibration(changes, beta),
                on_policy=split(changes) if config.on_policy else answers,
                ranking=_ranking(config, changes, beta),
                unseen=None if config.unseen is None else _unseen(config, work, models),
            )
        diagnosis = replace(diagnosis, advice=advice(diagnosis))
    if config.out is not None:
        from ches_jax.runs.directory import write_json

        Path(config.out).mkdir(parents=True, exist_ok=True)
        remove_leftovers(Path(config.out))
        write_json(Path(config.out) / RESULT, diagnosis.to_json())
    return diagnosis


def _require_own_place(config: DiagnoseConfig, source: str) -> None:
    """Refuses an --out that holds the diagnosis of something else: files of both would lie side by side."""
    if config.out is None or not (there := Path(config.out) / RESULT).is_file():
        return
    found = read_json(there, RunError, "a diagnosis")
    before = found.get("source") if isinstance(found, dict) else None
    if before not in (None, source):
        raise RunError(f"--out {config.out} holds the diagnosis of {before}; give a new directory for {source}")


def read_changes(config: DiagnoseConfig, work: Path, models: Models) -> Changes:
    """The changes of log-probabilities in the one source that the options name; models are scored below ``work``."""
    named = [n for n in ("path", "before", "logps") if getattr(config, n) is not None]
    if len(named) != 1 or (config.before is None) != (config.after is None):
        given = [f"--{n}" if n != "path" else f"PATH ({config.path})" for n in named]
        given += ["--after"] if config.after is not None else []
        both = config.path is not None and (config.before is not None or config.after is not None)
        how = (
            f"; pair by pair: ches diagnose --before {config.before or 'BASE'} --after {config.after or config.path} "
            f"--pairs {config.pairs or 'HELD-OUT'}"
        )
        raise ChesError(
            f"give one of {SOURCES}" + (f"; got {' and '.join(given)}" if given else "") + (how if both else "")
        )
    if config.before is not None and config.after is not None:
        tables = [_is_table(Path(p)) for p in (config.before, config.after)]
        if tables == [False, False]:
            return changes_between_models(config, work, models)
        if not all(tables):
            model = (config.before, config.after)[tables.index(False)]
            raise ChesError(f"--before and --after: {model} is no score table; give two models, or two score tables")
        from ches_jax.displacement.readers.logp_tables import read_score_tables

        return read_score_tables(Path(config.before), Path(config.after))
    if config.logps is not None:
        from ches_jax.displacement.readers.logp_tables import read_logps

        return read_logps(Path(config.logps))
    return _of_path(config, Path(str(config.path)))


def _of_path(config: DiagnoseConfig, path: Path) -> Changes:
    from ches_jax.displacement.readers import training_run

    if training_run.is_run(path):
        return training_run.read_run(path)
    if path.is_dir() and (path / RESULT).is_file():
        raise ChesError(
            f"{path}: is a diagnosis already; its page: ches report {path}, one of its pairs: ches show {path} ROW"
        )
    if _is_table(path):
        if path.is_file() and path.name != TABLE:
            return _of_parquet(config, path)
        raise ChesError(
            f"{path}: scores of one model; changes take two: ches diagnose --before {path} --after THE_SAME_PAIRS_AFTER"
        )
    return _of_log(config, path, read_log(path, config.held_out))


def _of_log(config: DiagnoseConfig, path: Path, log: Log) -> Changes:
    folder = path if path.is_dir() else path.parent
    file = Path(log.source.rsplit(" (", 1)[0])
    folders = dict.fromkeys([file.parent if file.is_file() else file, file.parent.parent, folder])
    settings = find_settings([f for f in folders if f.is_dir()], log.settings)
    return log_changes(log, settings, config.beta, config.rewards)


def _of_parquet(config: DiagnoseConfig, path: Path) -> Changes:
    """A table of its own: the log of a callback, log-probabilities before and after, or an exported log."""
    from ches_jax.displacement.readers import logp_tables, training_run

    table = read_parquet(path, RunError, "a displacement log, or log-probabilities before and after")
    if "dlogp_chosen" in table.column_names:
        return training_run.changes_of_table(training_run.read_log_table(path), str(path))
    if any((meaning := metric(name)) is not None and meaning.quantity in SIDES for name in table.column_names):
        return _of_log(config, path, log_of(f"{path} (Parquet)", python_rows(table), held_out=config.held_out))
    return logp_tables.read_logps(path)


def _is_table(path: Path) -> bool:
    if path.is_file():
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    return (path / TABLE).is_file()


@contextmanager
def _work(config: DiagnoseConfig) -> Iterator[Path]:
    """Where runs go that the diagnosis makes: --out, or a directory that is gone afterwards."""
    if config.out is not None:
        yield Path(config.out)
        return
    with tempfile.TemporaryDirectory(prefix="ches-diagnose-") as folder:
        yield Path(folder)


def _with_texts(config: DiagnoseConfig, work: Path, models: Models) -> tuple[DiagnoseConfig, OnPolicy]:
    """Generates and judges with both models, and measures how far the first model's own answers fell."""
    responses, judgments = generated_and_judged(config, work, models)
    found, lengths = [], []
    for name, folder in zip(("answers", "answers-after"), responses, strict=True):
        rows = rows_of(Path(folder))
        lengths.append(mean_tokens(rows))
        pairs = write_sampled_pairs(Path(folder), work / f"{name}.jsonl")
        models.share(pairs)
        changes = changes_between_models(replace(_scoring(config, str(pairs)), eos="given"), work / name, models)
        found.append(replace(split(changes, own=False), left_out=prompts_of(rows) - len(changes.chosen)))
    # what the second model's own answers gained is its divergence from the first
    config = replace(config, responses_before=responses[0], responses_after=responses[1], judgments=judgments)
    return config, replace(found[0], reverse_kl=-found[1].kl, tokens=(lengths[0], lengths[1]))


def _scoring(config: DiagnoseConfig, pairs: str) -> DiagnoseConfig:
    """The config with other pairs, in canonical columns, in place of those that are diagnosed."""
    plain: dict[str, Any] = {"columns": {}, "candidates": None, "split": None, "limit": None}
    return replace(config, pairs=pairs, on_bad_row="keep", template="auto", **plain)


def _unseen(config: DiagnoseConfig, work: Path, models: Models) -> Interval:
    """Mean change of both responses of each pair of --unseen.

    Raises:
      ChesError: no two models to score them with.
    """
    assert config.unseen is not None
    if config.before is None or config.after is None or _is_table(Path(config.before)):
        raise ChesError("--unseen needs --before MODEL and --after MODEL, which score its responses")
    changes = changes_between_models(_scoring(config, config.unseen), work / "unseen", models)
    return of_pairs(np.stack([(changes.chosen + changes.rejected) / 2]), changes.records)[0]


def _ranking(config: DiagnoseConfig, changes: Changes, beta: float | None) -> Ranking | None:
    """What both models rank rightly, where their log-probabilities are known."""
    if changes.start is None:
        return None
    after = changes.start[0] + changes.chosen, changes.start[1] + changes.rejected
    return ranking(changes.start, after, beta, config.label_noise, changes.records)


def _beta_of_run(config: DiagnoseConfig) -> float | None:
    """The beta of a run of `ches train`, whose loss is one of log-ratios."""
    if config.path is None or not Path(config.path).is_dir():
        return None
    from ches_jax.displacement.pair_table import source_of

    options = source_of(Path(config.path))
    given = (options.get("loss_args") or {}).get("beta")
    if given is not None:
        return float(given)
    return 0.1 if options.get("loss") in ("dpo", "sigmoid") else None


def _texts(config: DiagnoseConfig) -> Mapping[str, Any]:
    from ches_jax.displacement.pair_table import read_texts, source_of

    source: dict[str, Any] = {}
    for given in (config.path, config.before):
        if given is not None and Path(given).is_dir():
            source = dict(source_of(Path(given)))
            break
    if config.pairs is not None:
        names = ("pairs", "split", "columns", "candidates", "limit")
        source |= {name: getattr(config, name) for name in names}
    held_out = read_texts({**source, "pairs": source["eval_pairs"], "limit": None}) if source.get("eval_pairs") else {}
    return {**read_texts(source), **held_out}


def _with_source(changes: Changes, texts: Mapping[str, Any]) -> Changes:
    """Changes with what their source says: pairs of one prompt are resampled together, and each has its category."""
    rows = dict(changes.rows or {})
    ids = [str(i) for i in rows.get("row_id", ())]
    if texts and all(i in texts for i in ids):
        prompts = np.unique([texts[i]["prompt"] for i in ids], return_inverse=True)[1]
        if "category" not in rows and any(texts[i].get("category") for i in ids):
            rows["category"] = np.array([texts[i]["category"] for i in ids])
        changes = replace(changes, records=prompts, rows=rows)
    return replace(changes, beside=None if changes.beside is None else _with_source(changes.beside, texts))


def _harm(config: DiagnoseConfig, diagnosis: Diagnosis) -> Harm:
    before, after = (None if p is None else Path(p) for p in (config.responses_before, config.responses_after))
    return Harm(
        (
            margin_criterion(diagnosis.directions["margin"], str(diagnosis.margin), diagnosis.held_out),
            *text_criteria(before, after),
            judged_criterion([Path(p) for p in config.judgments], config.want),
        )
    )


def _with_pairs(config: DiagnoseConfig, changes: Changes, diagnosis: Diagnosis, texts: Mapping[str, Any]) -> Diagnosis:
    """The worst pairs, joined with what is known of them; all of them in a file below --out."""
    from ches_jax.displacement.pair_table import found_tables, pair_table, worst_rows, write_pairs

    tables = [Path(p) for p in config.scores]
    for given in (config.path, config.before, config.out):
        if given is not None and Path(given).is_dir():
            tables += [t for t in found_tables(Path(given)) if t not in tables]
            if given == config.before and _is_table(Path(given)):
                tables.append(Path(given))
    if tables and (changes.rows is None or "row_id" not in changes.rows):
        raise ChesError("--scores joins by row_id, which these changes do not have")
    table = pair_table(changes, config.tolerance, tables, texts)
    if config.out is not None:
        write_pairs(table, Path(config.out))
    return replace(diagnosis, worst=worst_rows(table))
