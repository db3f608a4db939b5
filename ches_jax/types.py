"""The words and records that travel between stages.

Words (used in code, files and messages alike):
  record      one entry of the data as read, in canonical columns; its index is its position in the source
  pair        a prompt with a chosen and a rejected response
  response    the tokens after the prompt; its terminator (EOS) is kept apart from its content
  item        a prompt with its responses, each once: what is packed (a pair is an item of two)
  packed batch   rows of one length, each holding several items; padding only at the ends of rows
  segment     the part of an item that all its responses share, or the rest of one response
  prediction  (source position, target token, segment): the state at the source predicts the target
  chunk       what is computed and kept at a time: records of a run's part file, vocabulary rows, positions
  bucket      a size that shapes are rounded up to, so that few programs are compiled
  run         one execution of a verb, and the directory it writes
  score       a number of one pair, computed on one model
  displacement  the change of a response's log-probability since step 0, in nats

Axis letters, one meaning each: B rows of a batch, T positions, U positions of the rejected response, Q positions that
ask (queries), D width, V vocabulary, C vocabulary rows of a chunk, N query heads, K key/value heads, G query heads of
one key/value head, H head width, R rotated dimensions, F mlp width, L layers, M predictions of a row, S segments of a
row, I and O inputs and outputs of a matrix. Any other axis is named by a word: ``keys``, ``blocks``, ``candidates``.

Alignment, drawn once for the whole project (P = 3 prompt tokens, 2 content tokens and a terminator):

    position             0    1    2    3    4    5
    token                p0   p1   p2   y1   y2   EOS
    hidden state         h0   h1   h2   h3   h4   (never computed: it predicts nothing)
    predicts                       y1   y2   EOS
    in S(y), eos=include           yes  yes  yes          |y| = 3
    in S(y), eos=exclude           yes  yes               |y| = 2
    "last hidden" h_{x,y}                    yes          (state at the last content token, both conventions)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Eos = Literal["include", "exclude", "given"]
"""Whether what ends a response counts in |y|. include: yes, and a response that nothing ends gets the end-of-sequence
token; exclude: no; given: where it is there, for responses of which some were cut before their end."""
OnBadRow = Literal["error", "drop", "keep"]
Template = str
"""auto: conversations go through the chat template, text stays text; always: text becomes one user
turn; none: no template, so only single-turn conversations can be read (as the text they hold). Any other word: as auto,
with the template of this name (of a tokenizer that has several) or of this file."""
Pairing = Literal["chosen-against-all", "all-pairs"]
"""Which pairs of a row's candidates: the best one against every worse one, or every one against every worse one."""
Control = Literal["none", "random", "length"]
"""What a selection is compared with: as many rows drawn at random, or matched in response length."""
SftUnit = Literal["sum", "token", "batch_token"]
"""Unit of a likelihood term: nats of the response, nats per token, or the mean over the tokens of the batch."""

Objective = Literal["grpo", "dapo", "dr_grpo", "rloo"]
"""What a policy-gradient loss makes of the rewards of a group (``forecast.advantages``)."""


@dataclass(frozen=True, slots=True)
class Response:
    """A tokenised response: its content, and the terminator that follows it when it is complete."""

    content: tuple[int, ...]
    terminator: int | None
    """The id of the end-of-sequence (or end-of-turn) token; None when the response was cut."""

    def targets(self, eos: Eos) -> tuple[int, ...]:
        """The tokens that count in |y| under the convention ``eos``.

        >>> Response((7, 8), 2).targets("include"), Response((7, 8), 2).targets("exclude")
        ((7, 8, 2), (7, 8))
        """
        if eos != "exclude" and self.terminator is not None:
            return (*self.content, self.terminator)
        return self.content


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """A preference pair as token ids, audited. What every stage after ``data.tokenize`` reads."""

    row_id: str
    """Hash of the pair's content (prompt, chosen, rejected)."""
    index: int
    """Position of the row in its source, from 0."""
    prompt: tuple[int, ...]
    chosen: Response
    rejected: Response
    flags: tuple[str, ...] = ()
    """Findings of the token audit, names of ``data.audit.FLAGS``."""
    category: str | None = None
    """The row's own ``category`` column, where it has one: carried through to the table."""
    detail: dict[str, str] = field(default_factory=dict)
    """For each flag that has one: what was found, for messages."""
    candidates: tuple[int, int] | None = None
    """Numbers of chosen and rejected among the ``responses`` of the row; None where the row is one pair."""
    rejected_prompt: tuple[int, ...] | None = None
    """The prompt of the rejected response, where it has one of its own: then the two share nothing."""

    @property
    def prompts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the chosen and of the rejected response.

        >>> TokenPair(row_id="", index=0, prompt=(5,), chosen=Response((7,), 2), rejected=Response((8,), 2)).prompts
        ((5,), (5,))
        """
        return self.prompt, self.prompt if self.rejected_prompt is None else self.rejected_prompt


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Number of leading tokens (or letters) that two sequences have in common.

    >>> common_prefix([5, 6, 7], [5, 6, 8, 9])
    2
    """
    both = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(left), len(right)))


def shared_prefix(pair: TokenPair) -> int:
    """Number of leading tokens that the contents of chosen and rejected have in common; 0 after two prompts."""
    return 0 if pair.rejected_prompt is not None else common_prefix(pair.chosen.content, pair.rejected.content)
