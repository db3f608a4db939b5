"""``ches report``: one self-contained page from a run directory, whatever command the run is of."""

from collections.abc import Iterable
from pathlib import Path, PurePath

from ches_jax.errors import RunError
from ches_jax.report.document import Page
from ches_jax.report.render import pieces
from ches_jax.runs.directory import CONFIG
from ches_jax.runs.files import found_below, remove_leftovers, replacing
from ches_jax.runs.store import fetched_run, is_store, output_place, place
from ches_jax.scores.table import FORECAST, INFLUENCE
from ches_jax.select.scored_rows import SourceRow

FILE_NAME = "report.html"


def report(run_dir: Path | str, out: Path | str | None = None, rows: Iterable[SourceRow] | None = None) -> Path:
    """Writes ``report.html`` from the directory of a run, whatever command it is of.

    Args:
      run_dir: the directory; a training run may be unfinished.
      out: where to write; the run directory itself when not given. A report that is there is written over.
      rows: of a score run, the rows that were scored, for their texts; opened from the run when not given.

    Returns:
      The path of the page.

    Raises:
      RunError: nothing in the directory can be drawn; the message names what is there.

    >>> from tempfile import TemporaryDirectory
    >>> from ches_jax import ScoreConfig, score
    >>> with TemporaryDirectory() as folder:
    ...     report(score(ScoreConfig(limit=4, out=f"{folder}/run"), quiet=True)).name
    'report.html'
    """
    if not isinstance(run_dir, str | PurePath) and not is_store(run_dir):
        raise RunError(f"report: a {type(run_dir).__name__}; expected the directory of a run, as the verbs return it")
    given = place(run_dir, RunError)
    folder = fetched_run(given, RunError)
    if folder.is_file():
        folder, given = folder.parent, given.parent
    return write_page(page_of(folder, rows), output_place(given if out is None else out, RunError))


def is_of_scores(folder: Path) -> bool:
    """Whether the page of a run directory is that of its scores."""
    return (folder / "scores.parquet").is_file() and not (folder / "diagnosis.json").exists()


def page_of(folder: Path, rows: Iterable[SourceRow] | None = None) -> Page:
    """The page of a run directory, by what it holds."""
    has = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "diagnosis.json" in has:
        from ches_jax.report.diagnosis_page import diagnosis_page

        return diagnosis_page(folder)
    if "scores.parquet" in has:
        from ches_jax.report.score_page import score_page

        return score_page(folder, rows)
    if has & {"displacement.parquet", "displacement"}:
        from ches_jax.report.training_page import training_page

        return training_page(folder)
    if FORECAST in has:
        from ches_jax.report.forecast_page import forecast_page

        return forecast_page(folder)
    if INFLUENCE in has:
        from ches_jax.report.forecast_page import influence_page

        return influence_page(folder)
    if "groups.parquet" in has:
        from ches_jax.report.groups_page import groups_page

        return groups_page(folder)
    if has & {"responses.jsonl", "judgments.jsonl"}:
        from ches_jax.report.response_page import response_page

        return response_page(folder)
    if "selection.json" in has:
        from ches_jax.report.selection_page import selection_page

        return selection_page(folder)
    raise RunError(f"{folder}: {_what_is_there(folder, has)}")


def write_page(page: Page, out: Path) -> Path:
    """Writes a page whole or not at all."""
    path = out / FILE_NAME
    remove_leftovers(out, FILE_NAME)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(pieces(page))
    return path


def _what_is_there(folder: Path, has: set[str]) -> str:
    expected = (
        "expected a directory of ches score (scores.parquet), train (displacement.parquet), diagnose (diagnosis.json), "
        "forecast (forecast.parquet), influence (influence.parquet), groups (groups.parquet), generate "
        "(responses.jsonl), judge (judgments.jsonl), select (selection.json) or verify (claims.json)"
    )
    if not folder.exists():
        return f"does not exist; {expected}"
    if not has:
        return f"is empty; {expected}"
    if "parts" in has and "config.json" in has:
        return "this run is not finished (parts, no table); finish it with --resume, or with `ches merge`"
    if has & {"trainer_state.json", "adapter_model.safetensors"} or any(
        n.startswith("events.out.tfevents") for n in has
    ):
        how = f"`ches diagnose {folder} --out D` reads its log, `ches report D` makes the page"
        return f"is a directory of another trainer; {how}"
    shown = ", ".join(sorted(n for n in has if not n.startswith("."))[:8])
    return f"nothing in it can be drawn: it has {shown}; {expected}{found_below(folder, CONFIG)}"
