"""The ``ches`` command: parse, call one function, say where the result is.

Progress, summaries and the line of results go to standard error, the result's path (or one JSON record with ``--json``)
to standard output. Exit codes: 0 done, 1 a check failed, 2 bad input (one message, no traceback), 70 a mistake of ours
(two lines, and the traceback in a file).

Help, usage errors and the verbs without a model load no jax.
"""

import contextlib
import io
import json
import logging
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from ches_jax import __version__
from ches_jax.errors import ChesError, os_error_text, printable
from ches_jax.runs.arrow import leave_pandas_out

HELP = ("--help", "-h", "help")


INTERRUPTED = 130
"""Exit code after Ctrl-C."""
INTERNAL_ERROR = 70
"""Exit code of an error that is ours: a traceback is kept in a file (``EX_SOFTWARE`` of sysexits.h)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    code = _main(words)
    if code and (processes := _joined_processes()) is not None:
        processes.exit_process(code)
    return code


def _main(words: Sequence[str]) -> int:
    """The one door for errors: whatever happens ends in a message and an exit code."""
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except ChesError as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say("stopped", INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has closed it
        _discard_output()
        return 141
    except OSError as error:
        if error.filename is None:  # standard output, if it was that, cannot take the rest either
            _discard_output()
        return _say(os_error_text(error), 2)
    except Exception as error:
        processes = _joined_processes()
        if processes is not None and (reason := processes.peer_failure(error)) is not None:
            return _say(reason, 2)
        if (reason := _known(error)) is not None:
            return _say(reason, 2)
        return _say(f"internal error: {type(error).__name__}: {str(error)[:300]}\n{_keep_traceback()}", INTERNAL_ERROR)


def _say(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"ches: {printable(message)}", file=sys.stderr)
    return code


def _known(error: Exception) -> str | None:
    """Errors of the system that libraries raise under types of their own, in words."""
    text = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory ({text or type(error).__name__}); take smaller batches, a smaller dtype or more devices"
    return text if "(os error " in text else None  # safetensors writes files in Rust


def _keep_traceback() -> str:
    """Write the traceback of the error at hand to a file; says where."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="ches-error-", suffix=".txt", delete=False, encoding="utf-8") as f:
            f.write(f"{version_text()}\n{sys.argv}\n\n{traceback.format_exc()}")
    except OSError:
        traceback.print_exc()
        return "this is a mistake of ches, not yours: please report it with the lines above"
    return f"this is a mistake of ches, not yours: please report it with the traceback in {f.name}"


def _discard_output() -> None:
    """Nothing more can be written: Python would fail again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: Sequence[str]) -> int:
    if words and words[0] in ("--version", "-V", "version"):
        print(version_text())
        return 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter shows its number
    from ches_jax.cli.commands import COMMANDS, Outcome
    from ches_jax.cli.help import command_help, verb_help
    from ches_jax.cli.suggest import corrected, the_verb
    from ches_jax.distributed.lead import Followed

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
    options.require_free()
    quiet_libraries()
    leave_pandas_out()
    options.keep_programs()
    try:
        with no_notebook():
            outcome = options.run()
    except Followed as done:
        outcome = Outcome(headline=done.headline, code=done.code)
    if options.json:
        print(json.dumps(outcome.record(verb)))
    else:
        if outcome.text:
            print(
                outcome.text if outcome.coloured else printable(outcome.text),
                file=sys.stdout if outcome.path is None else sys.stderr,
            )
        if outcome.path is not None:
            print(outcome.path)
    if not options.quiet or outcome.code:
        print(f"ches: {printable(outcome.headline)}", file=sys.stderr)
        if outcome.page_of is not None:
            page = shlex.quote(str(outcome.page_of))
            print(f"ches: its page: ches report {printable(page)}", file=sys.stderr)
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
            # help is ours (``cli.help``): without a description tyro does not read the docstring
            return tyro.cli(command, args=words, prog=f"ches {verb}", description="")
    except SystemExit:
        # tyro draws a box around its message, a rule under its first line, and breaks the others
        lines = [line.strip("╭╮╰╯│─ \n") for line in said.getvalue().splitlines()]
        problems = [line for line in lines if line.strip("-") and "help" not in line]
        title, *rest = problems or ["options that cannot be read"]
        said_in_one = ": ".join([title, " ".join(rest)] if rest else [title])
        raise ChesError(f"ches {verb}: {said_in_one} (ches {verb} --help)") from None


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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # absl makes its logger of its own class when it is imported; one made before would not know who called it
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    for name in ("jax", "jax._src.xla_bridge", "orbax", "flax", "transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def no_notebook() -> Iterator[None]:
    """Has IPython taken for absent, unless it is there already: flax would import it, to show modules in a notebook."""
    if "IPython" in sys.modules:
        yield
        return
    sys.modules["IPython"] = None  # type: ignore[assignment]  # what an import takes for a module that is not there
    try:
        yield
    finally:
        sys.modules.pop("IPython", None)


def _joined_processes() -> Any:
    """``distributed.processes`` where this process has joined others; no run without that module has."""
    processes = sys.modules.get("ches_jax.distributed.processes")
    return processes if processes is not None and processes.several_processes() else None
