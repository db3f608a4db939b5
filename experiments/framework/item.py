"""What every item of the paper has in common: its scales, its stages, the folder it works in, its result.

An item is a package ``experiments/NAME`` whose ``__init__`` brings, without importing jax:

    TITLE                  one line: what of the paper it reproduces
    SCALES                 {"tiny": Config, "small": ..., "paper": ...}: frozen dataclasses that extend ``Scale``
    stages(config)         list of ``Stage``, in order
    summarise(work)        JSON object of the result, from the values of the stages; no times, no paths
    rows(result)           list of ``ReportLine`` of the report, from one committed result
    figures(result, name, folder)    PNGs written into ``folder`` with names that start with ``name``; their paths
    tables(result)         optional: the paper's tables in its layout, Markdown
    page(result)           optional: the result as a page of ``ches_jax.report``, written beside it

Every item has the same five files: ``config.py`` (its scales), ``data.py`` (what the runs train on), ``runs.py`` (the
runs and their measurements), ``summary.py`` (the numbers of the result), ``report.py`` (lines, tables, figures). Each
imports from those before it only.
"""

import dataclasses
import importlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Self

from ches_jax.errors import ChesError, many
from ches_jax.runs.directory import device_name, open_run, versions, write_json
from ches_jax.runs.files import read_object, replacing
from experiments.framework.training import compiled_once

ROOT = Path(__file__).parents[2]
ITEMS = ("persona", "similarity", "sorrybench", "forecast", "story")
STAGES = "stages"
RESULT = "results.json"


@dataclass(frozen=True)
class Sft:
    """Fine-tuning on chosen responses: AdamW, a cosine schedule with 8 updates of warm-up, batches of 32."""

    lr: float
    epochs: float


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the runs of one scale are. Every field decides numbers but those of ``NOT_IDENTITY``."""

    model: str | None
    """Model directory, hub name, or ``bundled``; None: --model is required."""
    pairs: str | None
    """The item's data: file, hub name, or ``bundled``; None: --pairs is required."""
    seeds: tuple[int, ...]
    hardware: str
    """What the scale is meant for."""
    time: str
    """How long it takes there."""
    mesh: str | None = None
    """Devices, such as fsdp=3; None: all local devices on the data axis."""
    after_sft: bool = False
    """Whether a first step fine-tunes the model on the chosen responses, as ``sft`` says."""
    sft: Sft | None = None
    """How; None: the scale has no such step."""

    def with_options(self, **changes: Any) -> Self:
        """This scale with options of the command line in it."""
        return dataclasses.replace(self, **changes)


NOT_IDENTITY = ("hardware", "time", "mesh")


class Stage(NamedTuple):
    """One step of an item. What ``run`` returns (JSON values) is kept under ``name``: a stage that is there is skipped.

    ``run`` may write larger files below ``Work.folder``; a stage that was killed before it returned starts anew.
    """

    name: str
    run: Callable[["Work"], Any]


class ReportLine(NamedTuple):
    """One line of the report."""

    paper_item: str
    command: str
    hardware: str
    paper: str
    ours: str
    verdict: str


@dataclass(frozen=True)
class Work:
    """The folder of one run of an item: stages hand each other values through it."""

    item: str
    scale: str
    config: Any
    out: Path
    quiet: bool = False

    def file(self, stage: str) -> Path:
        """Where the value of a stage is."""
        return self.out / STAGES / f"{stage}.json"

    def value(self, stage: str) -> Any:
        """What an earlier stage returned."""
        return read_object(self.file(stage), ChesError, "the folder of an experiment with its earlier stages")["value"]

    def folder(self, name: str) -> Path:
        """A folder for files of a stage."""
        path = self.out / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def load(item: str) -> ModuleType:
    """The module of an item.

    Raises:
      ChesError: no such item, or one that is not written yet.
    """
    if item not in ITEMS:
        raise ChesError(f"no item {item!r}; there are {', '.join(ITEMS)}")
    try:
        return importlib.import_module(f"experiments.{item}")
    except ModuleNotFoundError as e:
        if e.name != f"experiments.{item}":
            raise
        raise ChesError(f"item {item!r} is not part of this checkout") from None


def configure(item: str, scale: str, changes: dict[str, Any]) -> Any:
    """The config of a scale with the options of the command line in it.

    Raises:
      ChesError: unknown scale, or a scale that needs --model or --pairs and lacks them.
    """
    scales = load(item).SCALES
    if scale not in scales:
        raise ChesError(f"{item} has no scale {scale!r}; there are {', '.join(scales)}")
    overrides = {k: v for k, v in changes.items() if v is not None}
    config = scales[scale].with_options(**overrides)
    missing = [f"--{name}" for name in ("model", "pairs") if getattr(config, name) is None]
    if missing:
        raise ChesError(
            f"{item} --scale {scale} needs {' and '.join(missing)}: a local path or a hub name; "
            "experiments/README.md names the ones that were used"
        )
    problems = [f"--{name} {path}: no such file or directory" for name, path in _paths(config) if not path.exists()]
    if problems:
        raise ChesError(many(f"{item} --scale {scale}", problems))
    if config.after_sft and config.sft is None:
        raise ChesError(f"{item} --scale {scale} has no step of SFT: leave --after-sft out")
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise ChesError(f"--seeds {' '.join(map(str, config.seeds))}: expected different whole numbers")
    return config


def _paths(config: Scale) -> list[tuple[str, Path]]:
    """Options that can only be paths: a hub name is ``owner/name``, without a dot or slash in front."""
    options = [("model", config.model), ("pairs", config.pairs)]
    return [
        (name, Path(v))
        for name, v in options
        if v is not None and (v.startswith((".", "/", "~")) or v.count("/") > 1 or v.endswith((".jsonl", ".json")))
    ]


def execute(item: str, scale: str, config: Any, out: Path, *, resume: bool, quiet: bool) -> Path:
    """Run the stages that are not there yet; returns the result's file.

    Raises:
      ChesError: ``out`` holds something else, or this run and ``resume`` is not set.
    """
    module = load(item)
    shown = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_IDENTITY}
    open_run(out, "experiment", {"item": item, "scale": scale, **shown}, resume)
    work = Work(item, scale, config, out, quiet)
    stages: Sequence[Stage] = module.stages(config)
    names = [s.name for s in stages]
    assert len(set(names)) == len(names), f"{item}: two stages of one name"
    current = commit()
    with compiled_once(out / "compiled"):
        for number, stage in enumerate(stages, 1):
            if not work.file(stage.name).exists():
                log_progress(work, f"[{number}/{len(stages)}] {stage.name}")
                _run_stage(work, stage, current)
    spent = [json.loads(work.file(name).read_text(encoding="utf-8")) for name in names]
    result = {
        "item": item,
        "scale": scale,
        "config": shown,
        "seeds": list(config.seeds),
        "device": device_name(),
        "machine": machine(),
        "versions": versions(),
        "commit": ", ".join(dict.fromkeys(str(s["commit"]) for s in spent)),
        "seconds": round(sum(s["seconds"] for s in spent), 1),
        "cpu_seconds": round(sum(s["cpu"] for s in spent), 1),
        "result": module.summarise(work),
    }
    write_result(out / RESULT, result)
    if hasattr(module, "page"):
        from ches_jax.report.page import write_page

        write_page(module.page(result), out)
    return out / RESULT


def write_result(path: Path, value: dict[str, Any]) -> None:
    """JSON with short lists on one line, so that a result is small and can be read."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda match: "[" + re.sub(r",\n\s+", ", ", match[1]) + "]", text)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _run_stage(work: Work, stage: Stage, commit: str | None) -> None:
    started, cpu = time.perf_counter(), time.process_time()
    value = stage.run(work)
    seconds = {"seconds": round(time.perf_counter() - started, 3), "cpu": round(time.process_time() - cpu, 3)}
    write_json(work.file(stage.name), {**seconds, "commit": commit, "value": value})


def log_progress(work: Work, text: str) -> None:
    """A line of progress on standard error."""
    if not work.quiet:
        import sys

        print(text, file=sys.stderr, flush=True)


def commit() -> str | None:
    """The commit of the checkout; a plus sign says that library or experiments were changed since. None outside git."""

    def git(*words: str) -> str | None:
        try:
            process = subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return process.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", "ches_jax", "experiments/*.py", "experiments/*/*.py")
    return f"{head}+" if head and changed else head


def machine() -> str:
    """Processor and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def result_file(item: str, name: str) -> Path:
    """Where a result is committed."""
    return ROOT / "experiments" / item / "results" / f"{name}.json"


def cell(text: str) -> str:
    r"""Text as a cell of a Markdown table.

    >>> print(cell("|y-| - |y+|"))
    \|y-\| - \|y+\|
    """
    return text.replace("|", "\\|").replace("\n", " ")


def run_command(result: dict[str, Any]) -> str:
    """The command that made a result."""
    config = result["config"]
    words = [f"python -m experiments.run {result['item']} --scale {result['scale']}"]
    if result["scale"].startswith("small"):
        words += [f"--{name} {config[name]}" for name in ("model", "pairs")]
    if config.get("after_sft"):
        words.append("--after-sft")
    return " ".join(words)


def ran_on(result: dict[str, Any]) -> str:
    """Device and time of a result; CPU time where it is a CPU, whose wall time depends on who else works there."""
    minutes = f"{result['seconds'] / 60:.0f} min"
    if "cpu" in result["device"]:
        return f"{result['machine']}; {result['cpu_seconds'] / 60:.0f} CPU min"
    return f"{result['device']}; {minutes}"


def items_of_the_paper(result: dict[str, Any], found: Sequence[str], of_the_verdicts: str) -> ReportLine:
    """The line that counts how many of the paper's statements a result agrees with.

    Args:
      result: a committed result.
      found: of each statement ``agree``, ``opposite`` or ``undecided``.
      of_the_verdicts: what a reader must know of them, such as that they are not corrected for their number.
    """
    counts = ", ".join(f"{list(found).count(word)} {word}" for word in ("agree", "opposite", "undecided"))
    verdict = f"of {len(found)} items of the paper: {counts}"
    return ReportLine("all of them", run_command(result), ran_on(result), "see above", of_the_verdicts, verdict)


def beyond_the_paper(result: dict[str, Any], item: str, ours: str, verdict: str) -> ReportLine:
    """A line about something that the paper does not have."""
    return ReportLine(f"beyond the paper: {item}", run_command(result), ran_on(result), "none", ours, verdict)
