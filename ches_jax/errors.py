"""One family of errors for everything a user can mend; the command line prints them and exits with 2.

A message names the subject, what was found, what was expected and what to do. Problems that are found
together are reported together.
"""

import difflib
from collections.abc import Sequence


class ChesError(Exception):
    """Something the user can mend: bad input, a wrong option, a directory that is not what it should be.

    >>> try:
    ...     raise ChesError("pairs.jsonl, line 3: no chosen response")
    ... except ChesError as error:
    ...     print(error)
    pairs.jsonl, line 3: no chosen response
    """


class CheckpointError(ChesError):
    """A model directory cannot be loaded as asked."""


class DataError(ChesError):
    """Preference data cannot be read or is not fit to be scored."""


class TemplateError(DataError):
    """The chat template itself cannot be used as asked, whatever the row."""


class RunError(ChesError):
    """A run directory cannot be used as asked."""


def os_error_text(error: OSError) -> str:
    """An error of the system in words.

    >>> os_error_text(OSError(28, "No space left on device", "runs/s/config.json"))
    'runs/s/config.json: No space left on device'
    """
    return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)


def require_config(verb: str, config: object, kind: type) -> None:
    """What a verb's function asks first: its options come as one config.

    Raises:
      ChesError: it is something else, such as the path that the command line takes.

    >>> try:
    ...     require_config("diagnose", "trl-out", dict)
    ... except ChesError as error:
    ...     print(error)
    ches_jax.diagnose: expected a dict, got 'trl-out'; write ches_jax.diagnose(ches_jax.dict(...)), with the options \
of ches diagnose
    """
    if not isinstance(config, kind):
        name = kind.__name__
        raise ChesError(
            f"ches_jax.{verb}: expected a {name}, got {config!r:.80}; "
            f"write ches_jax.{verb}(ches_jax.{name}(...)), with the options of ches {verb}"
        )


_KEPT = "\n\t\u200c\u200d"
"""Not printable, and harmless: lines, tabs, and the joiners of some scripts."""


def printable(text: str) -> str:
    r"""Text from files of others for a terminal: control characters, directional overrides, half surrogates escaped.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() or c in _KEPT else repr(c)[1:-1] for c in text)


def many(subject: str, problems: Sequence[str], limit: int = 20) -> str:
    """One message for all problems of one subject.

    >>> print(many("models/x", ["no config.json", "no tokenizer.json"]))
    models/x: 2 problems
      no config.json
      no tokenizer.json
    """
    if len(problems) == 1:
        return f"{subject}: {problems[0]}"
    shown = [f"  {p}" for p in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  ... and {len(problems) - limit} more")
    return "\n".join([f"{subject}: {len(problems)} problems", *shown])


def did_you_mean(word: str, names: Sequence[str], prefix: str = "") -> str:
    """The nearest names, each behind ``prefix``, as the end of a message; nothing where none is near.

    >>> did_you_mean("ipo", ["dpo", "ipo_mean", "ipo_sum"])
    '; did you mean ipo_mean or ipo_sum?'
    >>> did_you_mean("xyz", ["dpo"])
    ''
    """
    longer = [name for name in names if name.startswith(word) and len(word) > 2]
    near = longer or difflib.get_close_matches(word, names, n=2, cutoff=0.55)
    return f"; did you mean {' or '.join(prefix + name for name in near[:3])}?" if near else ""
