"""Work that the first of several processes decides on, and all of them compute together.

Only the first one reads what decides (logs, tables, texts) and writes what comes of it. It asks for each computation by
name; the others wait for its word, so that they need not see its files.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ches_jax.errors import ChesError

if TYPE_CHECKING:  # so that a verb that may be one process's loads no jax
    from ches_jax.distributed.processes import Process

T = TypeVar("T")
Ask = Callable[[str, Any], Any]
"""``ask(name, argument)``: what the function of that name makes of a JSON value, in all processes."""


class Followed(Exception):
    """Raised in a process that is not the first, when the first is done."""

    def __init__(self, headline: str, code: int = 0):
        """Takes what the first one has, in a line, and its exit code."""
        super().__init__(headline)
        self.headline, self.code = headline, code


def lead(
    process: "Process",
    functions: Mapping[str, Callable[[Any], Any]],
    decide: Callable[[Ask], tuple[T, tuple[str, int]]],
) -> T:
    """What ``decide(ask)`` gives in the first process, which may ask all for the computations that it needs.

    Args:
      process: which of how many this is.
      functions: what can be computed. They compute together, and share their errors (``Process.sharing_errors``).
      decide: called in the first process only; returns a result, and the line and exit code of the others.

    Raises:
      Followed: in the other processes, when ``decide`` has returned.
      ChesError: of ``decide``, in all of them.

    >>> from ches_jax.distributed.processes import Process
    >>> lead(Process(), {"double": lambda x: 2 * x}, lambda ask: (ask("double", 4) + 1, ("done", 0)))
    9
    """
    if not process.first:
        while (word := process.exchange(None)[0])["ask"] is not None:
            functions[word["ask"]](word["with"])
        raise Followed(*word["note"])
    together = False

    def ask(name: str, argument: Any) -> Any:
        nonlocal together
        process.exchange({"ask": name, "with": argument})
        together = True
        result = functions[name](argument)
        together = False
        return result

    try:
        result, note = decide(ask)
    except ChesError as error:
        if not together:  # what fails while all compute, all know
            process.exchange(None, str(error))
        raise
    process.exchange({"ask": None, "note": note})
    return result
