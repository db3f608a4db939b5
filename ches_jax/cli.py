"""The ``ches`` command: parse, call one function, print where the result is.

Progress and summaries go to standard error, the result's path (or JSON with ``--json``) to standard output. Exit codes:
0 done, 1 a check failed, 2 bad input (one message, no traceback).
"""

import dataclasses
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ches_jax.convert import ConvertConfig, convert
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.doctor import DoctorConfig, doctor
from ches_jax.errors import ChesError
from ches_jax.generate.config import GenerateConfig
from ches_jax.judges.config import JudgeConfig
from ches_jax.runs.directory import RUN, read_json
from ches_jax.scores.config import ScoreConfig
from ches_jax.select.config import SelectConfig
from ches_jax.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Score(ScoreConfig):
    """Score preference pairs: CHES and its relatives, per pair, as a table.

    Without arguments: the bundled pairs with the bundled model.
    """

    resume: bool = False
    """Go on with the run that --out holds."""
    quiet: bool = False
    """No progress, no summary."""
    json: bool = False
    """Print run.json instead of the path."""

    def run(self) -> int:
        """Scores, prints the summary and the path."""
        from ches_jax.report.summary import summary_text
        from ches_jax.scores.run import score
        from ches_jax.scores.table import FILE_NAME, read_table

        out = score(_only(ScoreConfig, self), resume=self.resume, quiet=self.quiet)
        if not (out / FILE_NAME).exists():
            print(f"this process's chunks are done; when all are, run: ches merge {out}", file=sys.stderr)
            return 0
        if not self.quiet:
            print(summary_text(read_table(out)[0]), file=sys.stderr)
        print(json.dumps(read_json(out / RUN)) if self.json else out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Doctor(DoctorConfig):
    """Audit a model directory and preference pairs; no forward pass. Exit code 1 when a row is flagged."""

    json: bool = False
    """Print the findings as JSON."""

    def run(self) -> int:
        """Examines and prints."""
        findings = doctor(_only(DoctorConfig, self))
        print(json.dumps(findings.to_json()) if self.json else findings.text())
        return 0 if findings.healthy else 1


@dataclass(frozen=True, kw_only=True)
class Select(SelectConfig):
    """Turn scores into a preference data set: the lowest, the highest, a window, soft weights, with controls."""

    json: bool = False
    """Print selection.json instead of the path."""

    def run(self) -> int:
        """Selects and prints the path."""
        from ches_jax.select.run import select

        summary = select(_only(SelectConfig, self))
        print(json.dumps(summary) if self.json else self.out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """One self-contained HTML page and PNG figures from a run directory."""

    run_dir: tyro.conf.Positional[Path]
    """A directory of `ches score` or `ches train`, or of `ches verify --out`."""
    out: Path | None = None
    """Where to write report.html and figures/; default: the run directory."""

    def run(self) -> int:
        """Writes the report and prints its path."""
        from ches_jax.report import report

        of_claims = (self.run_dir / "claims.json").is_file()
        write = _theory("theory.report").report if of_claims else report
        print(write(self.run_dir, self.out))
        return 0


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Join what the processes of a distributed `ches score` wrote; checks that every row is there once."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory of all of them."""

    def run(self) -> int:
        """Merges and prints the path."""
        from ches_jax.scores.run import merge

        print(merge(self.run_dir))
        return 0


@dataclass(frozen=True, kw_only=True)
class Convert(ConvertConfig):
    """Write a model directory anew (other shards, another dtype, an adapter merged), or a checkpoint of a run as one.

    Every name and shape is checked on the way.
    """

    def run(self) -> int:
        """Converts and prints the path."""
        print(convert(_only(ConvertConfig, self)))
        return 0


@dataclass(frozen=True, kw_only=True)
class Train(TrainConfig):
    """Train on preference pairs (the DPO family, or SFT) and watch every pair's log-probabilities."""

    resume: bool = False
    """Go on with the run that --out holds, from its last checkpoint."""
    quiet: bool = False
    """No progress."""
    json: bool = False
    """Print run.json instead of the path."""

    def run(self) -> int:
        """Trains and prints the path; 143 when SIGTERM stopped it."""
        from ches_jax.train.loop import Stopped, train

        try:
            out = train(_only(TrainConfig, self), resume=self.resume, quiet=self.quiet)
        except Stopped as e:
            print(f"ches: {e}", file=sys.stderr)
            return 143
        print(json.dumps(read_json(out / RUN)) if self.json else out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Generate(GenerateConfig):
    """Continue prompts by sampling (or greedily): responses.jsonl, a row for each text.

    Prompts are text or conversations, of a file of their own or of preference pairs. Prompts are padded to powers of
    two from 32, and one program is compiled for each that occurs.
    """

    resume: bool = False
    """Go on with the run that --out holds."""
    quiet: bool = False
    """No progress."""
    json: bool = False
    """Print run.json instead of the path."""

    def run(self) -> int:
        """Generates and prints the path of the responses."""
        from ches_jax.generate.run import FILE_NAME as RESPONSES
        from ches_jax.generate.run import generate

        out = generate(_only(GenerateConfig, self), resume=self.resume, quiet=self.quiet)
        print(json.dumps(read_json(out / RUN)) if self.json else out / RESPONSES)
        return 0


@dataclass(frozen=True, kw_only=True)
class Judge(JudgeConfig):
    """Did responses refuse? By a list of phrases, by a language model, or by labels: judgments.jsonl and the rate."""

    resume: bool = False
    """Go on with the run that --out holds."""
    quiet: bool = False
    """No progress, no summary."""
    json: bool = False
    """Print run.json instead of the path."""

    def run(self) -> int:
        """Judges, prints the refusal rate and the path of the judgments."""
        from ches_jax.judges.run import FILE_NAME as JUDGMENTS
        from ches_jax.judges.run import judge, summary_text

        out = judge(_only(JudgeConfig, self), resume=self.resume, quiet=self.quiet)
        told = read_json(out / RUN)
        if not self.quiet:
            print(summary_text(told["summary"]), file=sys.stderr)
        print(json.dumps(told) if self.json else out / JUDGMENTS)
        return 0


@dataclass(frozen=True, kw_only=True)
class Diagnose(DiagnoseConfig):
    """Did likelihood displacement happen? From a run, two score tables, log-probabilities or a TRL log."""

    json: bool = False
    """Print the diagnosis as JSON."""

    def run(self) -> int:
        """Prints the verdict; exit code 1 when --fail-if holds."""
        from ches_jax.displacement.diagnose import diagnose
        from ches_jax.displacement.verdict import rule_holds

        found = diagnose(_only(DiagnoseConfig, self))
        print(json.dumps(found.to_json()) if self.json else found.text())
        return int(rule_holds(found, self.fail_if))


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check the theory's claims on toy models, or on a real model and its pairs. Exit code 1 when a claim fails."""

    claims: tuple[str, ...] = ()
    """Ids such as T4 T5; default: all."""
    model: str | None = None
    """Check the claims about real models on this one."""
    pairs: str | None = None
    """Preference pairs for --model."""
    limit: int = 32
    """Pairs to use with --model."""
    instances: int = 1000
    """Random instances of each exact claim."""
    seed: int = 0
    """Of every random number."""
    out: Path | None = None
    """Directory for the results as JSON."""
    list: bool = False
    """Only list the claims."""

    def run(self) -> int:
        """Hands over to the theory, which lies beside the package in a checkout."""
        words = ["--seed", str(self.seed), "--instances", str(self.instances), "--limit", str(self.limit)]
        words += ["--claims", *self.claims] if self.claims else []
        for name, value in [("--model", self.model), ("--pairs", self.pairs), ("--out", self.out)]:
            words += [name, str(value)] if value is not None else []
        return _theory("theory.verify").main([*words, *(["--list"] if self.list else [])])


def _theory(module: str) -> Any:
    """A module of the theory, from the path or from the checkout this package is installed from."""
    checkout = Path(__file__).parents[1]
    if (checkout / "theory").is_dir() and str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] != "theory":
            raise
        raise ChesError("the theory is part of a checkout, not of the wheel: install with pip install -e .") from e


def _only(kind: type, values: Any) -> Any:
    """The part of a command's options that the function below takes."""
    return kind(**{f.name: getattr(values, f.name) for f in dataclasses.fields(kind)})


DESCRIPTION = "Likelihood displacement in preference optimisation: score, select, train, diagnose, verify."

Command = (
    Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Select, tyro.conf.subcommand("select")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Judge, tyro.conf.subcommand("judge")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        code = _main(argv)
    except Exception:
        if (processes := _joined_processes()) is not None:
            traceback.print_exc()
            processes.exit_process(1)
        raise
    if code and (processes := _joined_processes()) is not None:
        processes.exit_process(code)
    return code


def _joined_processes() -> Any:
    """``distributed.processes`` where this process has joined others; no run without that module has."""
    processes = sys.modules.get("ches_jax.distributed.processes")
    return processes if processes is not None and processes.several_processes() else None


def _main(argv: Sequence[str] | None) -> int:
    try:
        return tyro.cli(Command, args=argv, prog="ches", description=DESCRIPTION).run()  # type: ignore[arg-type]
    except ChesError as e:
        print(f"ches: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ches: stopped", file=sys.stderr)
        return 130
    except Exception as e:
        processes = _joined_processes()
        if processes is None or (reason := processes.peer_failure(e)) is None:
            raise
        print(f"ches: {reason}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
