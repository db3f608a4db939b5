"""The token audit: what can be wrong with a tokenised pair, counted, shown and acted upon.

``data.tokenize`` finds; this file names, counts and decides. Nothing is dropped silently: under
``--on-bad-row error`` one message tells all findings, under ``drop`` every row left out is written
down with its reasons, under ``keep`` the flags travel with the scores.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ches_jax.errors import DataError, many
from ches_jax.types import Response, TokenPair, shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLAGS: dict[str, str] = {
    "prompt_unclear": "the conversations in chosen and rejected do not continue the prompt: another system message or "
    "another question stands there",
    "prompt_repeated": "a response begins with the prompt, which the model would then read twice",
    "prompt_differs": "the chat template writes the prompt in one way when it asks for an answer and in another when "
    "one follows; the prompt was cut where the two part",
    "left_out": "the chat template leaves out a part of the row, so that the model would not see it",
    "prefix_mismatch": "the last letters of the prompt and the first of a response are one token (a piece of text that "
    "the model reads at once); the prompt was cut before it",
    "double_bos": "the mark of the beginning of a text (BOS) stands twice before the prompt, or inside a response",
    "double_eos": "the mark of the end (EOS) stands inside a response, or more than once at its end",
    "end_unclear": "it is not clear where a response ends",
    "empty_prompt": "there is no prompt (for whole conversations: chosen and rejected do not begin alike)",
    "empty_chosen": "the chosen response is empty",
    "empty_rejected": "the rejected response is empty",
    "blank": "a prompt or a response is white space alone",
    "identical": "chosen and rejected are the same",
    "truncated_chosen": "the chosen response was cut to --max-length, so that its end is missing",
    "truncated_rejected": "the rejected response was cut to --max-length, so that its end is missing",
    "prompt_too_long": "the prompt alone fills --max-length; prompts are never cut",
    "unreadable": "the row is not what a pair is made of",
    "template_refuses": "the row cannot be written with the chat template",
    "unknown_token": "a token id that the model's vocabulary does not have",
    "no_pair": "no two of the row's responses make a pair: there are fewer than two, or their scores are equal",
}
"""What can be wrong with a row, in words; ``docs/audit.md`` says of each what to do."""
WITHOUT_TOKENS = frozenset({"unreadable", "template_refuses", "unknown_token", "no_pair"})
"""Flags of rows that have no tokens to count."""
UNSCORABLE = WITHOUT_TOKENS | {"prompt_unclear", "empty_prompt", "empty_chosen", "empty_rejected", "prompt_too_long"}
"""Flags of pairs that have no score, whatever the policy."""

_LENGTH_FLAGS = {"truncated_chosen", "truncated_rejected", "prompt_too_long"}
_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_EXAMPLES = 3


@dataclass
class Audit:
    """Counts over pairs, in memory that does not grow with their number.

    Lengths are counted per value, so quantiles are exact and the memory is bounded by the longest.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    rows: int = 0
    flagged: int = 0
    unscorable: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first rows of each flag, as words for a message."""
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """Tokens: prompt, chosen and rejected (with terminator), and their shared prefix."""
    specials: dict[str, Counter[int]] = field(default_factory=dict)
    """How many rows have 0, 1, 2, ... BOS or terminators, per segment."""

    def add(self, pair: TokenPair) -> None:
        """Counts one pair."""
        self.rows += 1
        self.flagged += bool(pair.flags)
        self.unscorable += not UNSCORABLE.isdisjoint(pair.flags)
        for flag in pair.flags:
            self.flags[flag] += 1
            if self.flags[flag] <= _EXAMPLES:
                self.examples.setdefault(flag, []).append(_example(pair, flag))
        if not WITHOUT_TOKENS.isdisjoint(pair.flags):
            return
        prompts = pair.prompts if pair.rejected_prompt is not None else (pair.prompt,)
        for prompt in prompts:
            self._count(self.lengths, "prompt", len(prompt))
        self._count(self.lengths, "chosen", len(pair.chosen.targets("include")))
        self._count(self.lengths, "rejected", len(pair.rejected.targets("include")))
        self._count(self.lengths, "shared prefix", shared_prefix(pair))
        self._count(self.specials, "BOS in prompt", max(p.count(_none(self.bos_id)) for p in prompts))
        for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if self.bos_id != self.eos_id:
                inside = response.content.count(_none(self.bos_id))
                self._count(self.specials, f"BOS in {name}", inside)
            self._count(self.specials, f"EOS in {name}", _terminators(response, self.eos_id))

    def extend(self, pairs: Iterable[TokenPair]) -> None:
        """Counts several pairs."""
        for pair in pairs:
            self.add(pair)

    @staticmethod
    def _count(counters: dict[str, Counter[int]], name: str, value: int) -> None:
        counters.setdefault(name, Counter())[value] += 1

    def describe(self) -> str:
        """The audit as a table of plain text."""
        lines = [f"{self.rows} rows, {self.flagged} flagged, {self.unscorable} cannot be scored"]
        if self.lengths:
            lines.append(f"{'tokens':<16}" + "".join(f"{q:>8}" for q in _QUANTILES))
        for name, counts in self.lengths.items():
            lines.append(f"{name:<16}" + "".join(f"{v:>8}" for v in quantiles(counts).values()))
        for name, counts in self.specials.items():
            numbers = ", ".join(f"{n} in {rows} rows" for n, rows in sorted(counts.items()))
            lines.append(f"{name:<16}{numbers}")
        for flag in FLAGS:
            if self.flags[flag]:
                lines.append(f"{flag:<20}{self.flags[flag]:>8}  {FLAGS[flag]}")
                lines += [f"{'':<28}  {example}" for example in self.examples[flag]]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The audit as JSON values."""
        return {
            "rows": self.rows,
            "flagged": self.flagged,
            "unscorable": self.unscorable,
            "flags": {flag: self.flags[flag] for flag in FLAGS if self.flags[flag]},
            "examples": self.examples,
            "tokens": {name: quantiles(counts) for name, counts in self.lengths.items()},
            "specials": {
                name: {str(n): rows for n, rows in sorted(counts.items())} for name, counts in self.specials.items()
            },
        }


def quantiles(counts: Counter[int]) -> dict[str, int]:
    """Minimum, median, 90 and 99 percent and maximum of counted values (always one that occurs).

    >>> quantiles(Counter({1: 98, 7: 1, 9: 1}))
    {'min': 1, 'p50': 1, 'p90': 1, 'p99': 7, 'max': 9}
    """
    total, seen, result = counts.total(), 0, {}
    for value in sorted(counts):
        seen += counts[value]
        for name, share in _QUANTILES.items():
            if name not in result and seen >= max(1, share * total):
                result[name] = value
    return result


def require_clean(audit: Audit, subject: str = "--pairs") -> None:
    """The policy ``--on-bad-row error``.

    Raises:
      DataError: any row is flagged; tells all counts, the first rows of each and the ways out.
    """
    if not audit.flagged:
        return
    problems = [
        f"{flag}: {audit.flags[flag]} rows ({FLAGS[flag]}): {'; '.join(audit.examples[flag])}"
        for flag in FLAGS
        if audit.flags[flag]
    ]
    ways = [
        "--on-bad-row drop leaves these rows out and lists them in dropped.jsonl",
        "--on-bad-row keep scores what can be scored and flags it",
    ]
    if not _LENGTH_FLAGS.isdisjoint(audit.flags):
        ways.append("a larger --max-length truncates fewer")
    headline = f"{subject}: {audit.flagged} of {audit.rows} rows are not fit to be scored as they are"
    raise DataError(f"{many(headline, problems)}\nwhat to do: {'; '.join(ways)}")


def dropped_record(pair: TokenPair) -> dict[str, Any]:
    """The line of ``dropped.jsonl`` of a pair that the policy ``drop`` leaves out."""
    return {
        "row_id": pair.row_id,
        "index": pair.index,
        **({} if pair.candidates is None else {"candidates": list(pair.candidates)}),
        "reasons": list(pair.flags),
        "detail": dict(pair.detail),
    }


def visible(tokenizer: "PreTrainedTokenizerBase", pair: TokenPair, limit: int = 240) -> str:
    """A pair as the model sees it: special tokens and line ends visible, the boundary marked.

    Args:
      tokenizer: decodes the ids.
      pair: what to show.
      limit: characters of each part; a long prompt loses its middle, a long response its end.
    """
    lines = [
        f"row {pair.index} ({pair.row_id[:12]}{_numbers(pair)})" + (f" {', '.join(pair.flags)}" if pair.flags else ""),
    ]
    shown = None
    for name, ids, response in zip(("chosen", "rejected"), pair.prompts, (pair.chosen, pair.rejected), strict=True):
        prompt = _decoded(tokenizer, ids)
        if shown is None or pair.rejected_prompt is not None:
            lines.append(f"  prompt   [{len(ids)}] {_middle_cut(prompt, limit)} |<- response")
        shown = ids
        # Decoded after the prompt: alone, some decoders drop the space a response begins with.
        both = _decoded(tokenizer, ids + response.content)
        text = both.removeprefix(prompt) if both.startswith(prompt) else None
        text = _decoded(tokenizer, response.content) if text is None else text
        if len(text) > limit:
            text = text[:limit] + " ..."
        end = "(no end: cut)"
        if response.terminator is not None:
            end = f"|{_decoded(tokenizer, (response.terminator,))}"
        lines.append(f"  {name:<9}[{len(response.targets('include'))}] ->|{text}{end}")
    return "\n".join(lines)


def _example(pair: TokenPair, flag: str) -> str:
    detail = f", {pair.detail[flag]}" if flag in pair.detail else ""
    return f"row {pair.index} ({pair.row_id[:12]}{_numbers(pair)}{detail})"


def _numbers(pair: TokenPair) -> str:
    return "" if pair.candidates is None else ", responses {} and {}".format(*pair.candidates)


def _terminators(response: Response, eos_id: int | None) -> int:
    return response.content.count(_none(eos_id)) + (response.terminator is not None)


def _none(token_id: int | None) -> int:
    return -1 if token_id is None else token_id  # no token has a negative id


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text).replace("\r", "\\r").replace("\n", "\\n")


def _middle_cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} ... {text[-(limit // 2) :]}"
