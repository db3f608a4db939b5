"""Reproduce one item of the paper at one scale.

python -m experiments.run --list
python -m experiments.run ITEM --scale tiny|small|paper --out DIR [--model M --pairs P] [--seeds 0 1 2] [--resume]
                          [--after-sft]

Progress goes to standard error, the path of the result to standard output. Exit codes: 0 done, 2 bad input,
130 and 143 stopped by a signal.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ches_jax.errors import ChesError
from experiments.framework.item import ITEMS, configure, execute, load, result_file
from experiments.framework.training import Stopped


@dataclass(frozen=True, kw_only=True)
class Run:
    """Which item, at which scale, into which folder."""

    item: tyro.conf.Positional[str | None] = None
    """persona, similarity, sorrybench, forecast or story."""
    scale: str = "tiny"
    """tiny: the bundled model and world, minutes on a CPU. small: by --model and --pairs. paper: the paper's own."""
    out: Path | None = None
    """The folder to work in; a killed run continues in it with --resume."""
    model: str | None = None
    """Model directory or hub name, instead of the scale's own."""
    pairs: str | None = None
    """Data file or hub name, instead of the scale's own."""
    seeds: tuple[int, ...] | None = None
    """Instead of the scale's own."""
    mesh: str | None = None
    """Devices, such as fsdp=3 or data=4; default: all local devices on the data axis."""
    after_sft: bool = False
    """Fine-tune the model on the chosen responses first, where the scale says how: the usual recipe of preference
    optimisation, and the one in which chosen responses fall."""
    resume: bool = False
    """Go on with what --out holds."""
    plan: bool = False
    """Only list the stages."""
    record: str | None = None
    """Keep the result in the checkout under this name, for experiments.report; such as tiny."""
    quiet: bool = False
    """No progress."""
    list: bool = False
    """Only list items and scales."""


def run(options: Run) -> str:
    """What to print when it is done.

    Raises:
      ChesError: options that no run can be made of.
    """
    if options.list:
        return catalogue()
    if options.item is None:
        raise ChesError(f"name an item: {', '.join(ITEMS)} (or --list)")
    changes = {name: getattr(options, name) for name in ("model", "pairs", "seeds", "mesh")}
    changes["after_sft"] = options.after_sft or None
    config = configure(options.item, options.scale, changes)
    if options.plan:
        return "\n".join(stage.name for stage in load(options.item).stages(config))
    if options.out is None:
        raise ChesError("give the folder to work in with --out")
    result = execute(options.item, options.scale, config, options.out, resume=options.resume, quiet=options.quiet)
    if options.record is not None:
        kept = result_file(options.item, options.record)
        kept.parent.mkdir(exist_ok=True)
        kept.write_bytes(result.read_bytes())
        return str(kept)
    return str(result)


def catalogue() -> str:
    """Items and scales, with what each needs."""
    lines = []
    for item in ITEMS:
        try:
            module = load(item)
        except ChesError as e:
            lines.append(str(e))
            continue
        lines.append(f"{item}: {module.TITLE}")
        for name, scale in module.SCALES.items():
            model, pairs = scale.model or "--model", scale.pairs or "--pairs"
            lines.append(f"  {name:6} model {model}, data {pairs}; {scale.hardware}, {scale.time}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    try:
        print(run(tyro.cli(Run, args=argv, prog="experiments.run", description=__doc__)))
    except ChesError as e:
        print(f"experiments.run: {e}", file=sys.stderr)
        return 2
    except Stopped as e:
        print(f"experiments.run: {e}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("experiments.run: stopped; continue with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
