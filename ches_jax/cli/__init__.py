"""The ``ches`` command: parse, call one function, say where the result is.

Progress, summaries and the line of results go to standard error, the result's path (or one JSON record with ``--json``)
to standard output. Exit codes: 0 done, 1 a check failed, 2 bad input (one message, no traceback).

Help, usage errors and the verbs without a model load no jax.
"""

import contextlib
import io
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ches_jax import __version__
from ches_jax.errors import ChesError

HELP = ("--help", "-h", "help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(words)
    except Exception:
        if (processes := _joined_processes()) is not None:
            traceback.print_exc()
            processes.exit_process(1)
        raise
    if code and (processes := _joined_processes()) is not None:
        processes.exit_process(code)
    return code


def _main(words: Sequence[str]) -> int:
    try:
        return _run(words)
    except ChesError as error:
        print(f"ches: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ches: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        processes = _joined_processes()
        if processes is None or (reason := processes.peer_failure(error)) is None:
            raise
        print(f"ches: {reason}", file=sys.stderr)
        return 1


def _run(words: Sequence[str]) -> int:
    if words and words[0] in ("--version", "-V", "version"):
        print(version_text())
        return 0
    from ches_jax.cli.commands import COMMANDS
    from ches_jax.cli.help import command_help, verb_help
    from ches_jax.cli.suggest import corrected, the_verb

    if not words or words == ["--"] or (words[0] in HELP and len(words) == 1):
        print(command_help(COMMANDS))
        return 0
    if words[0] in HELP:  # ches help score
        words = [*words[1:], "--help"]
    verb = the_verb(words[0], tuple(COMMANDS))
    command = COMMANDS[verb]
    if {"--help", "-h"} & set(words[1:]):
        print(verb_help(verb, command))
        return 0
    options = _parsed(verb, command, corrected(verb, command, words[1:]))
    quiet_libraries()
    outcome = options.run()
    if options.json:
        print(json.dumps(outcome.record(verb), ensure_ascii=False))
    else:
        if outcome.text:
            print(outcome.text, file=sys.stdout if outcome.path is None else sys.stderr)
        if outcome.path is not None:
            print(outcome.path)
    if not options.quiet or outcome.code:
        print(f"ches: {outcome.headline}", file=sys.stderr)
        if outcome.page_of is not None:
            print(f"ches: its page: ches report {shlex.quote(str(outcome.page_of))}", file=sys.stderr)
    return outcome.code


def _parsed(verb: str, command: type[Any], words: Sequence[str]) -> Any:
    """The options of a verb.

    Raises:
      ChesError: words that do not parse.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(command, args=words, prog=f"ches {verb}")
    except SystemExit:
        # tyro draws a box around its message
        lines = [line.strip("╭╮╰╯│─ \n") for line in said.getvalue().splitlines()]
        problems = [line for line in lines if line and "help" not in line]
        raise ChesError(f"ches {verb}: {'; '.join(problems)} (ches {verb} --help)") from None


def version_text() -> str:
    """Versions of what decides numbers; nothing is imported for them."""
    from importlib.metadata import PackageNotFoundError, version

    words = [f"ches-jax {__version__}"]
    for name in ("jax", "flax", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            words.append(f"{name} {version(name)}")
    return ", ".join(words) + f", python {sys.version.split()[0]}"


def quiet_libraries() -> None:
    """Other libraries say on standard error only what went wrong."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # absl makes its logger of its own class when it is imported; one made before would not know who called it
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    for name in ("jax", "jax._src.xla_bridge", "orbax", "flax", "transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _joined_processes() -> Any:
    """``distributed.processes`` where this process has joined others; no run without that module has."""
    processes = sys.modules.get("ches_jax.distributed.processes")
    return processes if processes is not None and processes.several_processes() else None
