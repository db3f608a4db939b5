"""A diagnosis, or labels, by several processes: all of them run the models, and the first one does the rest."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.models import Models
from ches_jax.displacement.verdict import Diagnosis, rule_holds
from ches_jax.distributed.lead import Ask, lead
from ches_jax.distributed.mesh import parse_mesh
from ches_jax.distributed.processes import start_processes
from ches_jax.errors import ChesError
from ches_jax.generate.config import GenerateConfig
from ches_jax.generate.run import generate
from ches_jax.runs.directory import as_dict, versions
from ches_jax.runs.files import replacing
from ches_jax.runs.store import remove
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.run import score

T = TypeVar("T")


def together(config: DiagnoseConfig, quiet: bool, decide: Callable[[Models], Diagnosis]) -> Diagnosis:
    """What ``decide`` makes of the models, which all processes run together on one mesh.

    Raises:
      Followed: in all processes but the first; it has the verdict and the exit code.
      ChesError: as ``led``.
    """

    def decided(models: Models) -> tuple[Diagnosis, tuple[str, int]]:
        diagnosis = decide(models)
        code = int(rule_holds(diagnosis, config.fail_if))
        return diagnosis, (f"process 0 has the diagnosis: {diagnosis.verdict}", code)

    return led("diagnose", config, quiet, decided)


class OnAMesh(Protocol):
    """A verb's options that say where its models run."""

    @property
    def mesh(self) -> str | None: ...

    @property
    def distributed(self) -> str: ...


def led(verb: str, config: OnAMesh, quiet: bool, decide: Callable[[Models], tuple[T, tuple[str, int]]]) -> T:
    """What ``decide`` gives in the first process; all of them run the models that it is given, on one mesh.

    Args:
      verb: its name.
      config: its options, which are those of all processes.
      quiet: no progress.
      decide: returns a result, and the line and exit code of the other processes.

    Raises:
      Followed: in all processes but the first, with that line and code.
      ChesError: a mesh that leaves devices out; processes with other options.
    """
    process = start_processes(config.distributed)
    count = len(jax.devices())
    mesh = config.mesh or f"data={count}"
    if process.count > 1 and math.prod(parse_mesh(mesh).values()) != count:
        raise ChesError(f"--mesh {mesh!r}: the {process.count} processes have {count} devices; ches {verb} takes all")
    process.agree({**as_dict(config), "mesh": mesh, "versions": versions()})
    where: dict[str, Any] = {"mesh": mesh, "distributed": config.distributed}
    with ExitStack() as at_the_end:

        def share(file: dict[str, str]) -> None:
            path = Path(file["path"])
            if path.exists():
                return
            outermost = next(p for p in (path, *path.parents) if p.parent.exists())
            at_the_end.callback(remove, outermost)
            with replacing(path) as temporary:
                temporary.write_text(file["text"], encoding="utf-8")

        functions: dict[str, Callable[[Any], Any]] = {
            "score": lambda options: score(ScoreConfig(**options, **where), quiet=quiet, resume=True),
            "generate": lambda options: generate(GenerateConfig(**options, **where), quiet=quiet, resume=True),
            "share": share,
        }

        return lead(process, functions, lambda ask: decide(_at_word(ask)))


def _at_word(ask: Ask) -> Models:
    """Models that all processes run when the first one asks."""

    def options(config: Any) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("mesh", "distributed")}

    return Models(
        score=lambda config: ask("score", options(config)),
        generate=lambda config: ask("generate", options(config)),
        share=lambda path: ask("share", {"path": str(path), "text": path.read_text(encoding="utf-8")}),
    )
