"""Rows to audited token pairs: the one owner of BOS, EOS, the prompt boundary and truncation.

    text   prompt | response            joint = tokens of prompt + response, as one text
    ids    p0 p1 p2 | y1 y2 EOS         prompt = tokens of the prompt alone, if joint begins with it;
                                        otherwise as much of it as both joints begin with

Prompt and response are tokenised together, since that is what a model sees; the response never gets
a BOS or a leading space of its own.
"""

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ches_jax import bundled
from ches_jax.data import file_tokenizer
from ches_jax.data.audit import FLAGS, WITHOUT_TOKENS
from ches_jax.data.file_tokenizer import is_blank, token_ids
from ches_jax.data.prompts import ID_COLUMNS
from ches_jax.data.render import Rendered, RenderedPrompt, Writer
from ches_jax.data.repeats import doubts
from ches_jax.data.sources import Record
from ches_jax.data.template import template_in
from ches_jax.data.two_prompts import SIDES, halves, has_two_prompts
from ches_jax.errors import DataError, TemplateError
from ches_jax.types import Eos, Response, Template, TokenPair, common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
Triple = tuple[Ids, Ids, Ids]
"""Of the prompt, chosen and rejected."""

_NO_EOS = (
    "the tokenizer has no EOS token, so no response can be complete: use "
    "--eos exclude, or set eos_token in tokenizer_config.json"
)
MOST_TOKENS = 1 << 24
"""In a vocabulary, as in the sizes of a model."""
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local directory (never reaching for the network), of a hub name, or ``bundled``.

    Args:
      path: the directory or the name.

    Returns:
      A tokenizer of transformers; where ``tokenizer.json`` says all, one that reads it without importing transformers
      (``file_tokenizer``) and has the same ids, texts and attributes.

    Raises:
      DataError: there is none, or it cannot be read without running code from the directory.

    >>> from ches_jax.data.tokenize import load_tokenizer
    >>> len(load_tokenizer("bundled"))
    1280
    """
    if not isinstance(path, str | PurePath):
        raise DataError(
            f"load_tokenizer: a {type(path).__name__}; expected a directory with tokenizer.json, or a hub name"
        )
    path = bundled.located(str(path), bundled.model_dir)
    tokenizer = _read_tokenizer(path)
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= MOST_TOKENS:
        # the library writes down each id that is missing below the largest
        raise DataError(f"{path}: a token of its vocabulary has the id {largest}; expected ids below {MOST_TOKENS}")
    of_processor = Path(path) / "chat_template.json"
    if not tokenizer.chat_template and of_processor.is_file():
        tokenizer.chat_template = template_in(of_processor)  # what transformers' AutoProcessor takes
    if not isinstance(tokenizer, file_tokenizer.FileTokenizer):
        # long texts are counted and refused where that matters (--max-length); this warning names no row
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    try:
        token_ids(tokenizer, "a", add_special_tokens=True)
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{path}: the tokenizer cannot encode a letter ({type(cause).__name__}: {str(cause)[:200]}); look at "
            "tokenizer_config.json: the lengths and the tokens that it names"
        ) from cause
    return tokenizer


def _read_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    folder = Path(path)
    local = folder.is_dir()
    if not local and (folder.is_absolute() or str(path).startswith(".") or len(folder.parts) > 2):
        raise DataError(f"{path}: no such directory; expected a model directory or a hub name")
    if local and not any((folder / name).exists() for name in _VOCABULARY_FILES):
        if _of_own_code(folder):
            raise DataError(
                f"{path}: the tokenizer is a program in the directory (auto_map in tokenizer_config.json), and no code "
                "of a directory is run; convert the tokenizer to tokenizer.json, or take the directory of a conversion"
            )
        raise DataError(f"{path}: no tokenizer in this directory; expected {_VOCABULARY_FILES[0]}")
    alone = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
    sentencepiece = importlib.util.find_spec("sentencepiece") is not None
    if alone and not sentencepiece:
        raise _without_sentencepiece(path)
    if local and (tokenizer := file_tokenizer.read(folder)) is not None:
        return cast("PreTrainedTokenizerBase", tokenizer)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=local, trust_remote_code=False)
    except Exception as error:
        # Any failure of the class that the directory names; file and settings without it are often good enough, the
        # file without its settings never: it does not say which tokens begin and end a text, nor the chat template.
        if (folder / "tokenizer.json").exists():
            with contextlib.suppress(Exception):
                return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        reason = str(error).partition("\n")[0]
        if not sentencepiece and any(name in str(error).lower() for name in ("sentencepiece", "tiktoken")):
            raise _without_sentencepiece(path) from error  # a hub name; transformers asks for the wrong package
        missing = [n for n in ("tokenizer.json", "tokenizer_config.json") if not (folder / n).exists()]
        raise DataError(
            f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {reason}); "
            + (f"not there: {', '.join(missing)}; " if missing and local else "")
            + ("give a directory with" if missing or not local else "look at")
            + " tokenizer.json and tokenizer_config.json"
        ) from error


def _of_own_code(folder: Path) -> bool:
    """Whether a directory names Python files of its own as its tokenizer."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return "AutoTokenizer" in settings.get("auto_map", {})
    return False


def _without_sentencepiece(path: str | Path) -> DataError:
    return DataError(
        f"{path}: the tokenizer is tokenizer.model alone, which the package sentencepiece reads; install it with "
        "pip install 'ches-jax[sentencepiece]', or save the tokenizer with its tokenizer.json"
    )


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 over all that decides ids: the serialised tokenizer, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:
        state["padding"] = state["truncation"] = None  # settings of the last call
    parts = [state, _plain(tokenizer.special_tokens_map), tokenizer.chat_template]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class PairTokenizer:
    """Tokenises batches of rows. The result for a row does not depend on its batch.

    Attributes:
      tokenizer: a transformers tokenizer.
      max_length: most tokens of prompt and response together; longer responses are cut and flagged.
      eos: whether the terminator counts in a response's length (``types.Eos``).
      vocab_size: rows of the model's embedding; ids beyond are an error. None: not checked.
      template: see ``types.Template``.
      template_args: variables of the chat template, for every row.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    eos: Eos = "include"
    vocab_size: int | None = None
    template: Template = "auto"
    template_args: Mapping[str, Any] = field(default_factory=dict)
    writer: Writer = field(init=False, repr=False, compare=False)
    """Rows as text; ``tokenizer`` is the one with the template that was chosen."""
    _suffix: Ids = field(init=False, repr=False)
    """What the tokenizer itself puts after a text."""

    def __post_init__(self):
        if self.max_length < 2:
            raise DataError(f"--max-length {self.max_length}: expected room for a prompt and a response, at least 2")
        object.__setattr__(self, "writer", Writer.of(self.tokenizer, self.template, self.template_args))
        object.__setattr__(self, "tokenizer", self.writer.chat.tokenizer)
        if self.eos == "include" and self._eos_id is None and not self.writer.chat.exists:
            raise DataError(_NO_EOS)
        object.__setattr__(self, "_suffix", added_suffix(self.tokenizer))

    def __call__(self, rows: Sequence[Record]) -> list[TokenPair]:
        """Tokenises and audits rows; of a row with two prompts each response with its own.

        A row that cannot be read, written with the chat template, or found in the vocabulary is flagged and has no
        tokens.

        Raises:
          TemplateError: the chat template cannot be used, whatever the row.
        """
        apart = [has_two_prompts(row.content) for row in rows]
        parts = [
            replace(row, content=content)
            for row, two in zip(rows, apart, strict=True)
            for content in (halves(row.content) if two else [row.content])
        ]
        pairs = iter(self._tokenised(parts))
        return [_of_two_prompts(next(pairs), next(pairs)) if two else next(pairs) for two in apart]

    def _tokenised(self, rows: Sequence[Record]) -> list[TokenPair]:
        """The same for rows of one prompt."""
        written: dict[str, str] = {}
        rendered = [self._render(row, written) for row in rows]
        texts = [None if isinstance(text, str) else text for text in rendered]
        ids = self._encode(texts)
        return [
            _unfit(row, "template_refuses", refusal)
            if isinstance(refusal, str)
            else self._pair(row, text, next(ids) if text else None)
            for row, refusal, text in zip(rows, rendered, texts, strict=True)
        ]

    @property
    def _eos_id(self) -> int | None:
        return _single(self.tokenizer.eos_token_id)

    def _render(self, row: Record, written: dict[str, str]) -> Rendered | str | None:
        """The row as text, or why it cannot be written; None where there is nothing to write."""
        if row.fault or row.candidates == () or ID_COLUMNS[0] in row.content:
            return None
        try:
            # the pairs of one row have their texts in common: each is written once
            return self.writer.pair(row.content, written if row.candidates else None)
        except TemplateError as error:
            raise TemplateError(f"{_name(row)}: {error}") from error.__cause__
        except DataError as error:
            return str(error)

    def _encode(self, rendered: Sequence[Rendered | None]) -> Iterator[Triple]:
        """Yields prompt and joint ids of each rendered row, in order; one call per kind of text."""
        kinds = {
            templated: [r for r in rendered if r is not None and r.templated is templated]
            for templated in (False, True)
        }
        ids = {
            templated: iter(self._ids([t for r in some for t in (r.prompt, r.chosen, r.rejected)], templated))
            for templated, some in kinds.items()
        }
        for r in rendered:
            if r is not None:
                triples = ids[r.templated]
                yield next(triples), next(triples), next(triples)

    def _ids(self, texts: list[str], templated: bool) -> list[Ids]:
        return encode(self.tokenizer, texts, templated, self._suffix)

    def _pair(self, row: Record, text: Rendered | None, ids: Triple | None) -> TokenPair:
        if row.fault:
            return _unfit(row, "unreadable", row.fault)
        if row.candidates == ():
            return _unfit(row, "no_pair", _why_no_pair(row))
        details = doubts(row.content)
        if text is None or ids is None:
            prompt, chosen, rejected = (tuple(row.content[n]) for n in ID_COLUMNS)
            empty: tuple[str, ...] = ()
            blank: list[str] = []
        else:
            details |= text.found
            prompt, chosen, rejected = _cut(*ids, details, self.tokenizer)
            empty, blank = text.empty, [*text.blank]
        bos = _single(self.tokenizer.bos_token_id)
        if bos is not None and prompt[:2] == (bos, bos):
            details["double_bos"] = "prompt"
        complete = {
            name: self._complete(row, name, ids_, text, len(prompt), details)
            for name, ids_ in (("chosen", chosen), ("rejected", rejected))
        }
        if beyond := self._beyond_vocabulary((prompt, *(r.targets(self.eos) for r in complete.values()))):
            return _unfit(row, "unknown_token", beyond)
        if not prompt or "prompt" in empty:
            details["empty_prompt"] = ""
        for name, response in complete.items():
            if not response.content or name in empty:
                details[f"empty_{name}"] = ""
            elif text is not None and all(map(self._is_blank, response.content)):  # ids are what they are
                blank.append(name)
        if blank:
            details["blank"] = ", ".join(dict.fromkeys(blank))
        if len(prompt) >= self.max_length:
            details["prompt_too_long"] = f"{len(prompt)} tokens, --max-length {self.max_length}"
        else:
            complete = {n: self._truncated(n, r, len(prompt), details) for n, r in complete.items()}
        if complete["chosen"].content == complete["rejected"].content:
            details["identical"] = ""
        return TokenPair(
            row_id=row.row_id,
            index=row.index,
            prompt=prompt,
            chosen=complete["chosen"],
            rejected=complete["rejected"],
            flags=tuple(flag for flag in FLAGS if flag in details),
            category=row.category,
            detail={flag: details[flag] for flag in FLAGS if details.get(flag)},
            candidates=row.candidates or None,
        )

    def _complete(
        self, row: Record, name: str, ids: Ids, text: Rendered | None, prompt_tokens: int, details: dict[str, str]
    ) -> Response:
        """Splits a response into its content and what ends it, which is where the chat template or EOS says.

        A response that nothing ends gets EOS, but for ``eos`` as given.
        """
        eos, bos = self._eos_id, _single(self.tokenizer.bos_token_id)
        if text is None or not text.templated:
            content, run = self._split_given(name, ids, details, of_text=text is not None)
        elif not text.ends[name].ids:
            content, run = _without_run(ids, frozenset({eos} - {None}))
        else:
            content, run = self._split_written(name, ids, text, prompt_tokens, details)
        terminator = run[0] if run else None if self.eos == "given" else eos
        if terminator is None and self.eos == "include":
            raise DataError(f"{_name(row)}: {_NO_EOS}")
        said = text.said.get(name) if text is not None and text.templated else None
        extra = len(run) - len(set(run))
        inside = sum(self._marks(i, content, said) for i in {eos, terminator} if i is not None)
        if said is not None and inside:
            before = len(content) - len(_without_run(content, frozenset({terminator}))[0])
            extra, inside = min(before, inside), inside - min(before, inside)
        if extra:
            _note(details, "double_eos", f"{name} ends with {extra + 1}")
        if inside:
            _note(details, "double_eos", f"{inside} inside {name}")
        if bos is not None and bos != eos and (count := self._marks(bos, content, said)):
            _note(details, "double_bos", f"{count} inside {name}")
        return Response(content, terminator)

    def _marks(self, mark: int, content: Ids, said: str | None) -> int:
        """How often a mark of BOS or of an end stands in a response, of ids or of text (``said`` is None).

        Of a response that a template wrote, as often as its messages say it: the template's own marks, of the turns
        inside it, are no finding, nor is white space that ends an answer.
        """
        count = content.count(mark)
        if said is None or not count:
            return count
        word = str(self._added_tokens[mark].content if mark in self._added_tokens else self.tokenizer.decode([mark]))
        return min(count, said.count(word)) if word.strip() else 0

    def _split_written(
        self, name: str, ids: Ids, text: Rendered, prompt_tokens: int, details: dict[str, str]
    ) -> tuple[Ids, Ids]:
        """The content of a response that a template wrote, and the token that ends it: never one of its own."""
        end = text.ends[name]
        if end.in_pieces:
            what = f"the template ends {name} with {end.in_pieces!r}, which is no token of this tokenizer"
            _note(details, "end_unclear", what)
        stop = len(ids) - len(end.ids)
        if ids[stop:] == end.ids:
            return ids[:stop], end.ids[:1]
        written = getattr(text, name)
        if not ids or not written.endswith(end.text):
            what = f"the template does not write {end.text!r} behind {name}, as it does elsewhere"
            _note(details, "end_unclear", what)
            return ids, end.ids[:1]
        body = written.removesuffix(end.text)
        stop = min(common_prefix(self._ids([body], True)[0][prompt_tokens:], ids), len(ids) - 1)
        merged = str(self.tokenizer.decode([ids[stop]]))
        _note(details, "end_unclear", f"the last letters of {name} and what ends it are one token, {merged!r}")
        return ids[:stop], ids[stop : stop + 1]

    def _split_given(self, name: str, ids: Ids, details: dict[str, str], *, of_text: bool) -> tuple[Ids, Ids]:
        """The content of ids or of a text in the data, and what ends it: what ends an answer of the template, or EOS.

        A text may hold what a template wrote, its end and the line end behind that too. Ids hold their end; a text
        does only where its last token is of those that are no letters.
        """
        added, blank = self._added_tokens, self._is_blank
        last = next((i for i in reversed(ids) if not blank(i)), None)
        if of_text and last not in added:  # as most: what ends an answer of the template need not be known
            return _without_run(ids, frozenset({self._eos_id} - {None}))
        content, run = _without_run(ids, self._known_ends, blank)
        others = {_single(self.tokenizer.unk_token_id), *([_single(self.tokenizer.bos_token_id)] if of_text else [])}
        if not run and last in added.keys() - others and (added[last].special or not of_text):
            token = self.tokenizer.decode([last])  # type: ignore[list-item]
            _note(details, "end_unclear", f"{name} ends with {token!r}, which is not known to end a response")
        return content, run

    @cached_property
    def _added_tokens(self) -> Mapping[int, Any]:
        """The tokenizer's own property is made anew whenever it is read."""
        return dict(self.tokenizer.added_tokens_decoder)

    @cached_property
    def _is_blank(self) -> Callable[[int], bool]:
        """``is_blank``, decoded once for each token."""
        return cache(partial(is_blank, self.tokenizer))

    @cached_property
    def _known_ends(self) -> frozenset[int]:
        """Ids that end a response: EOS, and what the chat template ends an answer with."""
        return frozenset(i for i in (self._eos_id, self.writer.chat.answer_end()) if i is not None)

    def _truncated(self, name: str, response: Response, prompt_tokens: int, details: dict[str, str]) -> Response:
        room = self.max_length - prompt_tokens
        if len(response.targets(self.eos)) <= room:
            return response
        needed = prompt_tokens + len(response.targets(self.eos))
        details[f"truncated_{name}"] = f"{needed} tokens, --max-length {self.max_length}"
        return Response(response.content[:room], None)

    def _beyond_vocabulary(self, parts: Sequence[Ids]) -> str:
        largest = max((i for ids in parts for i in ids), default=0)
        if self.vocab_size is None or largest < self.vocab_size:
            return ""
        return (
            f"token id {largest}, but the model's vocabulary has {self.vocab_size} (the tokenizer's: "
            f"{len(self.tokenizer)}); use the tokenizer that belongs to the model"
        )


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str], templated: bool, suffix: Ids) -> list[Ids]:
    """Ids of texts, without the ``suffix`` that the tokenizer puts after a text."""
    if not texts:
        return []
    different = list(dict.fromkeys(texts))
    encoded = token_ids(tokenizer, different, add_special_tokens=not templated)  # a template writes its own
    by_text = {
        text: _without_suffix(tuple(ids), () if templated else suffix)
        for text, ids in zip(different, encoded, strict=True)
    }
    return [by_text[text] for text in texts]


class EncodedPrompt(NamedTuple):
    """A prompt as token ids, and the flags that show in its text with what was found."""

    ids: Ids
    found: Mapping[str, str]


def encode_prompts(writer: Writer, rows: Sequence[Record]) -> list[EncodedPrompt]:
    """Prompts (rows of ``sources.open_prompts``) as the tokens that scoring puts before a response.

    One that cannot be read, or written with the chat template, is flagged so and has no tokens.

    Raises:
      TemplateError: the chat template cannot be used, whatever the row.
    """
    tokenizer = writer.chat.tokenizer
    suffix = added_suffix(tokenizer)
    prompts = [_written_prompt(writer, row) for row in rows]
    texts: dict[bool, list[str]] = {False: [], True: []}
    for prompt in prompts:
        if isinstance(prompt, RenderedPrompt):
            texts[prompt.templated].append(prompt.text)
    ids = {templated: iter(encode(tokenizer, some, templated, suffix)) for templated, some in texts.items()}
    return [p if isinstance(p, EncodedPrompt) else EncodedPrompt(next(ids[p.templated]), p.found) for p in prompts]


def _written_prompt(writer: Writer, row: Record) -> RenderedPrompt | EncodedPrompt:
    if row.fault:
        return EncodedPrompt((), {"unreadable": row.fault})
    if "prompt_ids" in row.content:
        return EncodedPrompt(tuple(row.content["prompt_ids"]), {})
    try:
        return writer.prompt(row.content)
    except TemplateError as error:
        raise TemplateError(f"{_name(row)}: {error}") from error.__cause__
    except DataError as error:
        return EncodedPrompt((), {"template_refuses": str(error)})


def _unfit(row: Record, flag: str, detail: str) -> TokenPair:
    """What stands for a row that has no tokens."""
    nothing = Response((), None)
    return TokenPair(
        row_id=row.row_id,
        index=row.index,
        prompt=(),
        chosen=nothing,
        rejected=nothing,
        flags=(flag,),
        category=row.category,
        detail={flag: detail if flag == "no_pair" else f"{row.where}: {detail}"},
        candidates=row.candidates or None,
    )


def _of_two_prompts(chosen: TokenPair, rejected: TokenPair) -> TokenPair:
    """A pair of two responses with their prompts, from each as a pair of two equal ones."""
    for half in (chosen, rejected):
        if not WITHOUT_TOKENS.isdisjoint(half.flags):
            return half
    detail: dict[str, str] = {}
    for half, side in zip((chosen, rejected), SIDES, strict=True):
        (other,) = {*SIDES} - {side}
        for flag in half.flags:
            if flag == "identical" or flag.endswith(f"_{other}"):
                continue
            # what was found in the half's other response, which is the same one, is not reported twice
            found = [p for p in half.detail.get(flag, "").split(", ") if p and other not in p]
            detail[flag] = ", ".join(dict.fromkeys(p for p in (detail.get(flag, ""), *found) if p))
    flags = tuple(flag for flag in FLAGS if flag in detail)
    return replace(
        chosen,
        rejected=rejected.rejected,
        rejected_prompt=rejected.prompt,
        flags=flags,
        detail={flag: detail[flag] for flag in flags if detail[flag]},
    )


def _why_no_pair(row: Record) -> str:
    if tie := row.content.get("tie"):
        return f"a tie: {tie}"
    count = len(row.content["responses"])
    return f"{count} response{'s' * (count != 1)}{' of equal scores' * (count > 1)}"


def _cut(
    prompt: Ids, chosen: Ids, rejected: Ids, details: dict[str, str], tokenizer: "PreTrainedTokenizerBase"
) -> Triple:
    """Cuts both joints after the prompt, at the same place."""
    cut, joint = min(((common_prefix(prompt, ids), ids) for ids in (chosen, rejected)), key=lambda found: found[0])
    if cut < len(prompt) and "prompt_differs" not in details:
        merged = str(tokenizer.decode(list(joint[cut : cut + 1])))
        details["prefix_mismatch"] = f"prompt of {len(prompt)} tokens recut to {cut} before {merged!r}"
    return prompt[:cut], chosen[cut:], rejected[cut:]


def added_suffix(tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """The ids a tokenizer appends of its own accord, found by tokenising a letter."""
    full, bare = (list(token_ids(tokenizer, "a", add_special_tokens=special)) for special in (True, False))
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return tuple(full[start + len(bare) :])
    return ()


def _without_suffix(ids: Ids, suffix: Ids) -> Ids:
    return ids[: -len(suffix)] if suffix and ids[-len(suffix) :] == suffix else ids


def _without_run(ids: Ids, ends: frozenset[Any], blank: Callable[[int], bool] = lambda i: False) -> tuple[Ids, Ids]:
    """Ids without the end tokens that they close with, and these (without the white space between and after)."""
    run: list[int] = []
    stop = position = len(ids)
    while position and (ids[position - 1] in ends or blank(ids[position - 1])):
        position -= 1
        if ids[position] in ends:
            run.insert(0, ids[position])
            stop = position
    return ids[:stop], tuple(run)


def _single(token_id: Any) -> int | None:
    return token_id if isinstance(token_id, int) else None


def _note(details: dict[str, str], flag: str, what: str) -> None:
    details[flag] = f"{details[flag]}, {what}" if details.get(flag) else what


def _plain(value: Any) -> Any:
    """JSON values of special tokens, some of which are objects that print as their text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else str(value)


def _name(row: Record) -> str:
    return f"{row.where} (row_id {row.row_id[:12]})"
