"""The verbs: what each takes beyond its config, which function it calls, and what it says at the end.

Only config classes are imported here; a verb's code is imported when it runs.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from ches_jax.convert import ConvertConfig
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.doctor import DoctorConfig
from ches_jax.forecast.config import ForecastConfig, GroupsConfig, InfluenceConfig
from ches_jax.generate.config import GenerateConfig
from ches_jax.judges.config import JudgeConfig
from ches_jax.label.config import GatherConfig, LabelConfig
from ches_jax.options import Place
from ches_jax.plan.config import PlanConfig
from ches_jax.scores.config import ScoreConfig
from ches_jax.select.config import SelectConfig
from ches_jax.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a verb says when it is done."""

    headline: str
    """One line of results, on standard error."""
    path: Path | None = None
    """Where the result is, on standard output; without one, ``text`` goes there."""
    text: str = ""
    """For a person."""
    coloured: bool = False
    """Whether ``text`` bears colours of ours; what is of others in it is printable already."""
    counts: Mapping[str, Any] = field(default_factory=dict)
    paths: Mapping[str, Path] = field(default_factory=dict)
    """Beside ``path``, by what they hold."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the record of ``--json`` holds besides."""
    code: int = 0
    page_of: Path | None = None
    """A run directory that has a page; the command that makes it is named."""

    def record(self, verb: str) -> dict[str, Any]:
        """The one JSON value that ``--json`` prints."""
        paths = {} if self.path is None else {"result": self.path}
        return {
            **self.details,
            "verb": verb,
            "headline": self.headline,
            "paths": {name: str(path) for name, path in {**paths, **self.paths}.items()},
            "counts": dict(self.counts),
            "exit_code": self.code,
        }


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is printed."""

    quiet: bool = False
    """No progress, no summary."""
    json: bool = False
    """Print one JSON record (paths, counts, headline) instead of the path."""

    def keep_programs(self) -> None:
        """Nothing to keep: the verb compiles no programs, unless it is ``Computing``."""

    def require_free(self) -> None:
        """Nobody else writes where it writes: it makes a new directory whole, unless it is ``RunOutput``."""


@dataclass(frozen=True, kw_only=True)
class Computing(Output):
    """Of a verb that computes with a model: where its compiled programs are kept."""

    compilation_cache: str = "auto"
    """Where compiled programs are kept: auto (a private folder of yours, ~/.cache/ches-jax), off, or a folder that only
    you can write to; CHES_COMPILATION_CACHE says the same."""

    def keep_programs(self) -> None:
        """Has jax keep them.

        Raises:
          ChesError: a folder that others can write to.
        """
        from ches_jax.runs import compilation_cache

        compilation_cache.use(self.compilation_cache)


@dataclass(frozen=True, kw_only=True)
class RunOutput(Computing):
    """What is printed, and whether the run is a new one."""

    resume: bool = False
    """Go on with the run that --out holds."""
    other_versions: bool = False
    """With --resume: continue although package versions differ from those at the start."""

    def require_free(self) -> None:
        """Says at once, before jax is loaded, that another process works in --out.

        Raises:
          RunError: tells which.
        """
        from ches_jax.runs.lock import require_unheld
        from ches_jax.runs.store import is_address

        out = getattr(self, "out", None)
        if out and not is_address(str(out)):
            require_unheld(Path(out))

    @property
    def how(self) -> dict[str, Any]:
        """The arguments of a verb's function beside its config."""
        return {"resume": self.resume, "quiet": self.quiet, "other_versions": self.other_versions}


@dataclass(frozen=True, kw_only=True)
class Score(RunOutput, ScoreConfig):
    """Score preference pairs: CHES and its relatives, per pair, as a table.

    Without arguments: the bundled pairs with the bundled model.
    """

    def run(self) -> Outcome:
        """Scores; the summary of the table."""
        from ches_jax.report.summary import summary_text
        from ches_jax.runs.directory import RUN, read_json
        from ches_jax.scores.run import score
        from ches_jax.scores.table import FILE_NAME, open_table

        out = score(_only(ScoreConfig, self), **self.how)
        table = out / FILE_NAME
        if not table.exists():
            return _own_chunks(out)
        record = read_json(out / RUN)
        return Outcome(
            headline=f"{_scored(record['counts'])} -> {table}",
            path=out,
            text="" if self.quiet else summary_text(open_table(out)),
            counts=record["counts"],
            paths={"table": table, "run": out / RUN},
            details=record,
            page_of=out,
        )


def _own_chunks(out: Any) -> Outcome:
    """Of a process of several that leaves no result of its own."""
    what = f"when all are, run: ches merge {out} (on a mesh over all processes the first one has the result)"
    return Outcome(headline=f"this process's chunks are done; {what}", path=out)


def _texts(out: Any, file: Any, record: dict[str, Any]) -> Outcome:
    """Of a finished `ches generate`."""
    n = record["counts"]
    return Outcome(
        headline=f"{n['texts']} texts of {n['prompts']} prompts, {n['dropped']} dropped -> {file}",
        path=file,
        counts=n,
        paths={"run": out / "run.json"},
        details=record,
    )


def _judged(out: Path, *, quiet: bool) -> Outcome:
    """Of a finished `ches judge`."""
    from ches_jax.judges.run import FILE_NAME, summary_text
    from ches_jax.runs.directory import RUN, read_json

    record = read_json(out / RUN)
    summary = record["summary"]
    counts = {name: summary[name] for name in ("responses", "refusals", "undecided")}
    return Outcome(
        headline=f"{counts['refusals']} of {counts['responses']} refused, {counts['undecided']} undecided "
        f"-> {out / FILE_NAME}",
        path=out / FILE_NAME,
        text="" if quiet else summary_text(summary),
        counts=counts,
        paths={"run": out / RUN},
        details=record,
    )


@dataclass(frozen=True, kw_only=True)
class Doctor(Output, DoctorConfig):
    """Audit a model directory and preference pairs, or the pairs alone as data; no forward pass.

    Exit codes: 0 healthy; 1 a row is flagged, or without --model a check is beyond its threshold; 2 bad input.
    """

    def run(self) -> Outcome:
        """Examines."""
        from ches_jax.doctor import doctor

        findings = doctor(_only(DoctorConfig, self))
        return Outcome(
            headline=findings.headline,
            text=findings.text(),
            counts=findings.counts,
            details=findings.to_json(),
            code=0 if findings.healthy else 1,
        )


@dataclass(frozen=True, kw_only=True)
class Select(Output, SelectConfig):
    """Turn scores into a preference data set: the lowest, the highest, a window, soft weights, with controls."""

    def run(self) -> Outcome:
        """Selects."""
        from ches_jax.select.run import select

        summary = select(_only(SelectConfig, self))
        counts = summary["counts"] | {"dropped": sum(summary["source"]["dropped"].values())}
        pairs = self.out / "pairs.jsonl"
        rows = counts["kept"] + counts["dropped"]  # those that scoring dropped among them
        return Outcome(
            headline=f"kept {counts['kept']} of {rows}, {counts['dropped']} dropped -> {pairs}",
            path=self.out,
            counts=counts,
            paths={"pairs": pairs, "dropped": self.out / "dropped.jsonl", "run": self.out / "selection.json"},
            details=summary,
        )


@dataclass(frozen=True, kw_only=True)
class Label(Output, LabelConfig):
    """How sure is each label? Pairs with rewards of both responses and the probability that the label is right.

    The column goes to `ches train --label-probabilities label_probability` and to
    `ches select --by column:label_probability`. Rows of one response get a weight with --by density-ratio:
    `ches train --loss "weighted(bco)" --weights density_weight`.
    """

    def run(self) -> Outcome:
        """Labels."""
        from ches_jax.label.run import PAIRS, SUMMARY, headline, label, summary_text

        record = label(_only(LabelConfig, self), quiet=self.quiet)
        out, n = Path(self.out), record["counts"]
        return Outcome(
            headline=f"{headline(record)} -> {out / PAIRS}",
            path=out,
            text="" if self.quiet else summary_text(record),
            counts=n,
            paths={"pairs": out / PAIRS, "run": out / SUMMARY},
            details=record,
        )


@dataclass(frozen=True, kw_only=True)
class Gather(Output, GatherConfig):
    """Pairs and generated texts into the rows that an objective reads: D2O's samples, contests, fDPO, goals."""

    def run(self) -> Outcome:
        """Gathers."""
        from ches_jax.label.gather import PAIRS, SUMMARY, gather

        record = gather(_only(GatherConfig, self))
        out, n = Path(self.out), record["counts"]
        return Outcome(
            headline=f"{n['rows']} rows of {n['pairs']} pairs -> {out / PAIRS}",
            path=out,
            counts=n,
            paths={"pairs": out / PAIRS, "run": out / SUMMARY},
            details=record,
        )


@dataclass(frozen=True, kw_only=True)
class RecipeOf(Output):
    """Run the commands of a TOML file one after another: generate, label or judge, select, train, diagnose."""

    file: tyro.conf.Positional[Path]
    """The recipe: [[stage]] tables with name, verb and options; examples are in examples/recipes."""
    out: str = ""
    """Directory for all stages; default: the first free runs/recipe-NNN."""
    resume: bool = False
    """Go on with what --out holds: stages that are done are not made again."""

    def run(self) -> Outcome:
        """Runs all stages."""
        from ches_jax.cli.recipe import RECORD, run_recipe
        from ches_jax.runs.directory import new_name
        from ches_jax.runs.progress import say

        out = Path(self.out) if self.out else new_name(Path("runs"), "recipe")
        verbs = tuple(verb for verb in COMMANDS if verb not in ("recipe", "show", "merge", "completion"))
        quiet = self.quiet
        record = run_recipe(
            self.file,
            out,
            lambda verb, words: _stage(verb, words, resume=self.resume, quiet=quiet),
            verbs,
            resume=self.resume,
            say=lambda text: say(text, quiet=quiet),
        )
        return Outcome(
            headline=f"{record['stages']} stages -> {out}",
            path=out,
            counts={"stages": record["stages"]},
            paths={"run": out / RECORD},
            details=record,
        )


def _stage(verb: str, words: list[str], *, resume: bool, quiet: bool) -> Outcome:
    """Runs one command of a recipe."""
    from ches_jax.cli import _parsed
    from ches_jax.cli.suggest import corrected

    command = COMMANDS[verb]
    how = ["--resume"] if resume and issubclass(command, RunOutput) else []
    how += ["--quiet"] if quiet else []
    return _parsed(verb, command, corrected(verb, command, [*words, *how])).run()


@dataclass(frozen=True, kw_only=True)
class Generate(RunOutput, GenerateConfig):
    """Continue prompts by sampling (or greedily): responses.jsonl, a row for each text.

    Prompts are text or conversations, of a file of their own or of preference pairs. Room for prompts
    is a power of two from 32, and a program is compiled for each that occurs; equal prompts of a batch are read once.
    """

    def run(self) -> Outcome:
        """Generates."""
        from ches_jax.generate.run import FILE_NAME, generate
        from ches_jax.runs.directory import RUN, read_json

        out = generate(_only(GenerateConfig, self), **self.how)
        return _own_chunks(out) if not (out / RUN).exists() else _texts(out, out / FILE_NAME, read_json(out / RUN))


@dataclass(frozen=True, kw_only=True)
class Judge(RunOutput, JudgeConfig):
    """Did responses refuse? By a list of phrases, by a language model, or by labels: judgments.jsonl and the rate."""

    def run(self) -> Outcome:
        """Judges; the refusal rate."""
        from ches_jax.judges.run import judge
        from ches_jax.runs.directory import RUN

        out = judge(_only(JudgeConfig, self), **self.how)
        return _judged(out, quiet=self.quiet) if (out / RUN).exists() else _own_chunks(out)


@dataclass(frozen=True, kw_only=True)
class Train(RunOutput, TrainConfig):
    """Train on preference pairs (the DPO family, or SFT) and watch every pair's log-probabilities."""

    def run(self) -> Outcome:
        """Trains; exit code 143 when SIGTERM stopped it."""
        from ches_jax.runs.directory import RUN, read_json
        from ches_jax.train.loop import Stopped, train

        try:
            out = train(_only(TrainConfig, self), **self.how)
        except Stopped as stopped:
            return Outcome(headline=str(stopped), code=143)
        record = read_json(out / RUN)
        n = record["counts"]
        return Outcome(
            headline=f"{n['updates']} updates on {n['train']} pairs, {n['dropped']} dropped -> {out}",
            path=out,
            counts=n,
            paths={"run": out / RUN, **({"model": out / "model"} if self.export else {})},
            details=record,
            page_of=out,
        )


@dataclass(frozen=True, kw_only=True)
class Forecast(RunOutput, ForecastConfig):
    """Before training: how much will chosen and rejected responses change, of these and of held-out pairs, and why?

    Options are those of `ches train`: the run that is forecast. Costs about eight forward passes of the pairs.
    """

    def run(self) -> Outcome:
        """Forecasts; the changes in nats, and their reason in a sentence."""
        from ches_jax.forecast.run import forecast
        from ches_jax.forecast.summary import headline, summary_text
        from ches_jax.runs.directory import RUN, read_json
        from ches_jax.scores.table import FORECAST

        out = forecast(_only(ForecastConfig, self), **self.how)
        record = read_json(out / RUN)
        return _forecast_outcome(
            out / FORECAST, record, headline(record["summary"]), "" if self.quiet else summary_text(record["summary"])
        )


@dataclass(frozen=True, kw_only=True)
class Influence(RunOutput, InfluenceConfig):
    """Before training: which pairs will lower the chosen responses of held-out pairs, and by how much?

    The table goes to `ches select --by influence`. Options are those of `ches train`.
    """

    def run(self) -> Outcome:
        """Computes influences; how concentrated they are."""
        from ches_jax.forecast.influence import summary_text
        from ches_jax.forecast.run import influence
        from ches_jax.runs.directory import RUN, read_json
        from ches_jax.scores.table import INFLUENCE

        out = influence(_only(InfluenceConfig, self), **self.how)
        record = read_json(out / RUN)
        concentration = record["concentration"]
        headline = f"{concentration['push_down']:.0%} of {concentration['pairs']} pairs push chosen responses down"
        return _forecast_outcome(out / INFLUENCE, record, headline, "" if self.quiet else summary_text(record))


@dataclass(frozen=True, kw_only=True)
class Groups(RunOutput, GroupsConfig):
    """Before a policy-gradient update: how will the responses of each group change, and which winners will fall?

    Rollouts as RL trainers write them, with rewards or advantages (GRPO, DAPO, Dr. GRPO, RLOO).
    """

    def run(self) -> Outcome:
        """Computes rates and forecasts; the winners that fall."""
        from ches_jax.forecast.group_run import GROUPS, groups
        from ches_jax.forecast.group_summary import headline, summary_text
        from ches_jax.runs.directory import RUN, read_json

        out = groups(_only(GroupsConfig, self), **self.how)
        record = read_json(out / RUN)
        return _forecast_outcome(
            out / GROUPS, record, headline(record["summary"]), "" if self.quiet else summary_text(record["summary"])
        )


@dataclass(frozen=True, kw_only=True)
class Diagnose(Computing, DiagnoseConfig):
    """Did the chosen responses fall, was it harm, which pairs, and what to do? From a log, a run or two models."""

    def run(self) -> Outcome:
        """The verdict; exit code 1 when --fail-if holds."""
        from ches_jax.displacement.diagnose import RESULT, diagnose
        from ches_jax.displacement.verdict import rule_holds
        from ches_jax.runs.store import is_there, place

        diagnosis = diagnose(_only(DiagnoseConfig, self), quiet=self.quiet)
        failed = rule_holds(diagnosis, self.fail_if)
        out = None if self.out is None else place(self.out)
        paths = {} if out is None else {"diagnosis": out / RESULT}
        if out is not None and is_there(out / "pairs.parquet"):
            paths["pairs"] = out / "pairs.parquet"
        return Outcome(
            headline=diagnosis.headline + (f"; --fail-if {self.fail_if} holds" if failed else ""),
            path=out,
            text=diagnosis.text(),
            counts={"pairs": diagnosis.pairs, "records": diagnosis.records},
            paths=paths,
            details=diagnosis.to_json(),
            code=int(failed),
            page_of=out,
        )


@dataclass(frozen=True, kw_only=True)
class Report(Output):
    """One self-contained HTML page from a run directory, whatever command the run is of."""

    run_dir: tyro.conf.Positional[Place]
    """A directory of `ches score`, `train`, `diagnose`, `generate`, `judge`, `select`, or of `ches verify --out`."""
    out: Place | None = None
    """Where to write report.html; default: the run directory."""

    def run(self) -> Outcome:
        """Writes the report."""
        from ches_jax.report.page import report
        from ches_jax.runs.store import size_of
        from ches_jax.verify import theory

        of_claims = (self.run_dir / "claims.json").is_file()
        write = theory("theory.report").report if of_claims else report
        page = write(self.run_dir, self.out)
        size = size_of(page)
        return Outcome(headline=f"a page of {size / 1e6:.1f} MB -> {page}", path=page, counts={"bytes": size})


@dataclass(frozen=True, kw_only=True)
class Show(Output):
    """One pair of a run in the terminal: its numbers, its texts, its tokens in colour where it has token scores."""

    run_dir: tyro.conf.Positional[Place]
    """A directory of `ches score`, `train`, `diagnose --out`, `generate`, `judge` or `select`."""
    row: tyro.conf.Positional[str]
    """The pair as the page calls it (96, held_out-96), its row of the data, or the beginning of its row_id."""

    def run(self) -> Outcome:
        """Prints it."""
        import os
        import sys

        from ches_jax.report.terminal import pair_text

        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        text = pair_text(self.run_dir, self.row, colour=colour)
        return Outcome(
            headline=f"row {self.row} of {self.run_dir}",
            text=text,
            coloured=colour,
            details={"text": text},
            page_of=self.run_dir,
        )


@dataclass(frozen=True, kw_only=True)
class Merge(Output):
    """Join what processes of a distributed `ches score`, `generate` or `judge` wrote; each row must be there once."""

    run_dir: tyro.conf.Positional[Place]
    """The run directory of all of them."""

    def run(self) -> Outcome:
        """Merges."""
        from ches_jax.runs.directory import CONFIG, RUN, read_json
        from ches_jax.scores.table import FILE_NAME

        verb = read_json(self.run_dir / CONFIG).get("verb")
        if verb == "judge":
            from ches_jax.judges import run as judging

            return _judged(judging.merge(self.run_dir), quiet=self.quiet)
        if verb == "generate":
            from ches_jax.generate import run as generating

            out = generating.merge(self.run_dir)
            return _texts(out, out / generating.FILE_NAME, read_json(out / RUN))
        from ches_jax.scores.run import merge

        out = merge(self.run_dir)
        record = read_json(out / RUN)
        table = out / FILE_NAME
        return Outcome(
            headline=f"{_scored(record['counts'])} -> {table}",
            path=out,
            counts=record["counts"],
            paths={"table": table, "run": out / RUN},
            details=record,
        )


@dataclass(frozen=True, kw_only=True)
class Verify(Computing):
    """Check the theory's claims on toy models, or on a real model and its pairs. Exit code 1 when a claim fails."""

    claims: tuple[str, ...] = ()
    """Ids such as T4 T5; default: all."""
    model: str | None = None
    """Check the claims about real models on this one."""
    pairs: str | None = None
    """Preference pairs for --model; default: the bundled ones."""
    limit: int = 32
    """Pairs to use with --model."""
    instances: int = 1000
    """Random instances of each exact claim."""
    seed: int = 0
    """Of every random number."""
    out: Place | None = None
    """Directory for the results as JSON; `ches report` makes a page of it."""
    list: bool = False
    """Only list the claims."""

    def run(self) -> Outcome:
        """Checks the claims."""
        from ches_jax.verify import theory

        if self.list:
            claims = theory("theory.claims").all_claims()
            lines = [f"{c.id:5} {c.scope:5} {c.status:18} {c.statement} [{c.source}]" for c in claims]
            return Outcome(headline=f"{len(claims)} claims", text="\n".join(lines), counts={"claims": len(claims)})
        verification = theory("theory.verify")
        if self.out:
            from ches_jax.runs.directory import require_no_other

            require_no_other(self.out, "claims.json", "this verification")
        options = {name: getattr(self, name) for name in ("seed", "instances", "model", "pairs", "limit")}
        results = verification.verify(self.claims or None, **options, quiet=self.quiet)
        failed = [r.id for r in results if not r.passed]
        held = f"{len(results) - len(failed)} of {len(results)} claims hold"
        path = verification.write_results(self.out, results, options) if self.out else None
        text = "\n".join([verification.table(results), held + (f"; not: {', '.join(failed)}" if failed else "")])
        return Outcome(
            headline=held + (f" -> {path}" if path else ""),
            path=path,
            text=text,
            page_of=None if path is None else path.parent,
            counts={"claims": len(results), "held": len(results) - len(failed), "failed": len(failed)},
            details={"claims": [{"id": r.id, "passed": r.passed, "value": r.value} for r in results]},
            code=1 if failed else 0,
        )


@dataclass(frozen=True, kw_only=True)
class Convert(Output, ConvertConfig):
    """Write a model directory anew (other shards, another dtype, an adapter merged), or a checkpoint of a run as one.

    Every name and shape is checked on the way.
    """

    def run(self) -> Outcome:
        """Converts."""
        from ches_jax.convert import convert
        from ches_jax.runs.store import size_of

        out = convert(_only(ConvertConfig, self))
        shards = sorted(out.glob("*.safetensors"))
        size = sum(size_of(path) for path in shards)
        return Outcome(
            headline=f"{len(shards)} weight files, {size / 1e6:.1f} MB -> {out}",
            path=out,
            counts={"weight_files": len(shards), "bytes": size},
        )


@dataclass(frozen=True, kw_only=True)
class Plan(Computing, PlanConfig):
    """Before a run: does it fit on those devices, what moves between them, how long would it take at best?

    Compiled for the named devices on this machine, which needs none of them (extra tpu), from a config alone; for GPUs
    by arithmetic. Exit code 1 when nothing fits.
    """

    def run(self) -> Outcome:
        """Plans."""
        from ches_jax.plan.run import plan, table
        from ches_jax.runs.store import place

        found = plan(_only(PlanConfig, self), quiet=self.quiet)
        fits = "fits" if found["fits"] else "does not fit"
        return Outcome(
            headline=f"{fits} with --mesh {found['mesh']} ({found['counted']})",
            path=None if self.out is None else place(self.out),
            text=table(found),
            counts={"devices": found["devices"], "parameters": found["parameters"]},
            details=found,
            code=0 if found["fits"] else 1,
        )


@dataclass(frozen=True, kw_only=True)
class Completion(Output):
    """A script that completes verbs, options and values in a shell: `eval "$(ches completion bash)"`."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """bash, zsh or fish."""

    def run(self) -> Outcome:
        """Prints it."""
        from ches_jax.cli.completion import script

        return Outcome(headline=f"completion of {self.shell}", text=script(self.shell, COMMANDS))


COMMANDS: dict[str, type[Any]] = {
    "score": Score,
    "doctor": Doctor,
    "plan": Plan,
    "select": Select,
    "label": Label,
    "gather": Gather,
    "generate": Generate,
    "judge": Judge,
    "train": Train,
    "forecast": Forecast,
    "influence": Influence,
    "groups": Groups,
    "diagnose": Diagnose,
    "report": Report,
    "show": Show,
    "merge": Merge,
    "verify": Verify,
    "convert": Convert,
    "recipe": RecipeOf,
    "completion": Completion,
}


def _only(kind: type, values: Any) -> Any:
    """The part of a command's options that the function below takes."""
    return kind(**{f.name: getattr(values, f.name) for f in dataclasses.fields(kind)})


def _scored(counts: Mapping[str, Any]) -> str:
    dropped = counts.get("dropped", 0)
    return f"scored {counts.get('kept', counts['rows'])} of {counts['rows']}, {dropped} dropped"


def _forecast_outcome(table: Path, record: Mapping[str, Any], headline: str, text: str) -> Outcome:
    """What is said of a table that a pass over gradients made, beside the ``run.json`` that ``record`` is."""
    from ches_jax.runs.directory import RUN

    return Outcome(
        headline=f"{headline} -> {table}",
        path=table.parent,
        text=text,
        counts=record["counts"],
        paths={"table": table, "run": table.parent / RUN},
        details=record,
    )
