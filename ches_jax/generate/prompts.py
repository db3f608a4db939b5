"""What a run continues: prompts, opened, tokenised and checked before anything is computed or written."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ches_jax.data import audit
from ches_jax.data.render import Writer
from ches_jax.data.sources import PairSource, Record
from ches_jax.data.tokenize import EncodedPrompt, encode_prompts
from ches_jax.errors import ChesError, DataError, many
from ches_jax.generate.config import GenerateConfig
from ches_jax.inputs import ModelFiles, Opener, sequence_length
from ches_jax.runs import chunks
from ches_jax.types import OnBadRow, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNREAD = {name: audit.FLAGS[name] for name in ("unreadable", "template_refuses", "unknown_token")}
FLAGS = UNREAD | {
    "left_out": audit.FLAGS["left_out"],
    "empty_prompt": "the prompt is empty",
    "blank": "the prompt is white space alone",
    "double_bos": "more than one BOS at the start of the prompt",
    "prompt_too_long": "the prompt alone fills --max-length; prompts are never cut",
}
IMPOSSIBLE = {"prompt_too_long", *UNREAD}
"""No text can be made, whatever the policy."""
_EXAMPLES = 3
_LOOKED_AT = 200
"""Rows that say whether prompts are conversations."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids, checked."""

    row_id: str
    index: int
    ids: tuple[int, ...]
    content: Mapping[str, Any]
    category: str | None
    extra: Mapping[str, Any]
    flags: tuple[str, ...]
    detail: str = ""
    """Why the row cannot be read or written."""

    @property
    def impossible(self) -> bool:
        """Whether nothing can be made of it, whatever the policy."""
        return not self.ids or not IMPOSSIBLE.isdisjoint(self.flags)

    def dropped(self) -> dict[str, Any]:
        """Its line in dropped.jsonl."""
        detail = {"detail": {self.flags[0]: self.detail}} if self.detail else {}
        return {"row_id": self.row_id, "index": self.index, "reasons": list(self.flags), **detail}


@dataclass(frozen=True)
class Encoder:
    """A model directory and its tokenizer: rows to prompts."""

    model: ModelFiles
    writer: Writer
    max_length: int

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, with the chat template that was chosen."""
        return self.writer.chat.tokenizer

    def __call__(self, rows: Sequence[Record], name: str) -> list[Prompt]:
        """Tokenised and checked.

        Args:
          rows: what to continue.
          name: where they come from, for messages.

        Raises:
          DataError: the chat template cannot be used, whatever the row.
        """
        try:
            encoded = encode_prompts(self.writer, rows)
        except DataError as e:
            raise DataError(f"{name}, {e}") from e.__cause__
        return [self._checked(row, prompt) for row, prompt in zip(rows, encoded, strict=True)]

    def _checked(self, row: Record, prompt: EncodedPrompt) -> Prompt:
        ids, flags = prompt.ids, list(prompt.found)
        if unread := next((flag for flag in flags if flag in UNREAD), None):
            return _unread(row, unread, prompt.found[unread])
        bos = self.tokenizer.bos_token_id
        assert bos is None or isinstance(bos, int)
        if not ids and bos is None:
            return _unread(row, "empty_prompt", "and the tokenizer has no BOS to start with")
        if not ids or not any(row.content.values()):
            flags.append("empty_prompt")
        if bos is not None and ids[:2] == (bos, bos):
            flags.append("double_bos")
        if len(ids) >= self.max_length:
            flags.append("prompt_too_long")
        if max(ids, default=0) >= self.model.decoder.vocab_size:
            fault = f"token id {max(ids)}, but the model's vocabulary has {self.model.decoder.vocab_size}; "
            return _unread(row, "unknown_token", f"{fault}use the tokenizer that belongs to the model")
        return Prompt(row.row_id, row.index, ids or (bos or 0,), row.content, row.category, row.extra, tuple(flags))


def _unread(row: Record, flag: str, detail: str) -> Prompt:
    """What stands for a row that has no prompt to continue."""
    return Prompt(row.row_id, row.index, (), row.content, row.category, row.extra, (flag,), f"{row.where}: {detail}")


@dataclass(frozen=True)
class Inputs:
    """Prompts by the chunk."""

    encoder: Encoder
    source: PairSource
    chunk_rows: int
    limit: int | None
    on_bad_row: OnBadRow

    def chunks(
        self,
        first: int = 0,
        wanted: Callable[[int], bool] = lambda number: True,
        at_end: Callable[[int], None] = lambda number: None,
    ) -> Iterator[tuple[int, list[Prompt], list[Prompt]]]:
        """Numbered chunks from ``first`` on, those that are wanted: prompts to continue, and prompts that are left out.

        ``at_end`` is called with the number of all chunks when the data have come to their end.
        """
        start = first * self.chunk_rows
        rows = itertools.islice(
            self.source.iter_from(start), None if self.limit is None else max(self.limit - start, 0)
        )
        for number, chunk in chunks.numbered(rows, self.chunk_rows, first, wanted, at_end):
            prompts = self.encoder(chunk, self.source.name)
            out = [p for p in prompts if p.flags and (self.on_bad_row == "drop" or p.impossible)]
            left = {id(p) for p in out}
            yield number, [p for p in prompts if id(p) not in left], out

    def templated(self) -> bool:
        """Whether the chat template writes one of the first prompts."""
        mode = self.encoder.writer.mode
        contents = (row.content for row in itertools.islice(self.source.tolerant(), _LOOKED_AT))
        return any(
            "prompt" in c and mode != "none" and (mode == "always" or isinstance(c["prompt"], list)) for c in contents
        )

    def require_clean(self) -> int:
        """The policy ``--on-bad-row error``; returns the number of prompts.

        Raises:
          DataError: any row is flagged; tells all counts and the first rows of each.
        """
        counts: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        rows = flagged = 0
        for _, kept, out in self.chunks():
            for p in sorted([*kept, *out], key=lambda p: p.index):
                rows, flagged = rows + 1, flagged + bool(p.flags)
                for flag in p.flags:
                    counts[flag] += 1
                    if counts[flag] <= _EXAMPLES:
                        long = f", {len(p.ids)} tokens, --max-length {self.encoder.max_length}"
                        shown = long if "long" in flag else f", {p.detail}" if p.detail else ""
                        examples.setdefault(flag, []).append(f"row {p.index} ({p.row_id[:12]}{shown})")
        if flagged:
            problems = [f"{f}: {n} rows ({FLAGS[f]}): {'; '.join(examples[f])}" for f, n in counts.items()]
            headline = many(
                f"{self.source.name}: {flagged} of {rows} prompts cannot be continued as they are", problems
            )
            raise DataError(
                f"{headline}\nwhat to do: --on-bad-row drop leaves these out and lists them in dropped.jsonl; "
                "--on-bad-row keep continues those that can be"
            )
        return rows


def open_model_and_prompts(config: GenerateConfig, opener: Opener) -> Inputs:
    """Open and check the model directory, the tokenizer and the prompts; nothing is computed or written."""
    encoder = open_encoder(opener, config.model, config.max_length, config.template, config.template_args)
    source = opener.prompts(config.prompts, config.split, config.columns, schema=config.schema)
    return Inputs(encoder, source, config.chunk_rows, config.limit, config.on_bad_row)


def open_encoder(
    opener: Opener,
    spec: str,
    max_length: int | None,
    template: Template,
    template_args: Mapping[str, Any],
    option: str = "model",
) -> Encoder:
    """Open and check a model directory and its tokenizer."""
    model = opener.model(spec, option)
    if max_length is not None and max_length < 2:
        raise ChesError(f"--max-length {max_length}: expected room for a prompt and a text, at least 2")
    length = sequence_length(model.decoder, max_length)
    return Encoder(model, Writer.of(opener.tokenizer(model, template), template, template_args), length)
