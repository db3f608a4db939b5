"""The one place where a run opens what it reads; rows as chunks of token pairs.

Whatever is opened is fingerprinted as it is opened, so that the identity of a run is by construction all that it read:
``--resume`` refuses a run one of whose files is another now, and names the file.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ches_jax import bundled
from ches_jax.data.audit import Audit
from ches_jax.data.sources import LABELS, Kind, PairSource, open_pairs, open_prompts, open_rows
from ches_jax.data.template import with_template
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer, tokenizer_fingerprint
from ches_jax.errors import ChesError, RunError, many
from ches_jax.hf.directory import (
    CONFIG,
    file_digests,
    joined_fingerprint,
    model_files,
    read_config,
    resolve,
    weight_files,
)
from ches_jax.hf.quantised.schemes import scheme_of
from ches_jax.hf.text_part import text_config
from ches_jax.models.adapters.peft import adapter_directory, adapter_files
from ches_jax.models.checkpoint.stored_names import effective_config
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.registry import decoder_config
from ches_jax.runs.store import here, is_store, version_mark
from ches_jax.types import Eos, Pairing, Template, TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ches_jax.scores.config import ScoreConfig

DATA = {"pairs": "data", "prompts": "data", "responses": "data", "eval_pairs": "eval"}
"""Option -> the name its fingerprint has in ``config.json``, where that is not the option's own."""


@dataclass(frozen=True)
class ModelFiles:
    """A model directory that was opened and checked; weights are loaded by who needs them."""

    directory: Path
    decoder: DecoderConfig

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The directory's tokenizer."""
        return load_tokenizer(self.directory)

    def pair_tokenizer(
        self, *, max_length: int | None, eos: Eos, template: Template, template_args: Mapping[str, Any]
    ) -> PairTokenizer:
        """Records to token pairs as this model reads them; as ``pair_tokenizer``."""
        return pair_tokenizer(
            self.tokenizer, self.decoder, max_length=max_length, eos=eos, template=template, template_args=template_args
        )


class Opener:
    """Opens what a run reads, and keeps the fingerprint of each thing as it is opened.

    >>> opener = Opener()
    >>> opener.model("bundled").decoder.vocab_size, sorted(opener.identity())
    (1280, ['model_fingerprint', 'opened'])
    """

    def __init__(self, columns: Collection[str] = ()) -> None:
        """Nothing is open yet; ``columns`` of the data are read by options of the run."""
        self._columns = columns
        self._opened: dict[str, dict[str, str]] = {}
        self._prints: dict[str, str] = {}
        self._sources: dict[str, PairSource] = {}
        self._schemas: dict[str, dict[str, Any]] = {}
        self._stats: dict[Path, tuple[Any, ...]] = {}

    def identity(self) -> dict[str, Any]:
        """What was opened.

        ``opened`` (option -> file -> SHA-256), ``schemas`` (how columns are read), and one fingerprint for each
        thing by its name.
        """
        opened = {option: dict(files) for option, files in self._opened.items()}
        return {**self._prints, "opened": opened, **({"schemas": self._schemas} if self._schemas else {})}

    def model(self, spec: str | Path, option: str = "model") -> ModelFiles:
        """A model directory or hub name.

        Raises:
          CheckpointError: no such directory, files missing, an architecture that is not supported.
        """
        directory = resolve(spec)
        decoder = decoder_config(effective_config(directory), str(directory))
        digests = self._register(option, directory, model_files(directory))
        self._prints[f"{option}_fingerprint"] = joined_fingerprint(
            digests, [directory / CONFIG, *weight_files(directory)]
        )
        if scheme := scheme_of(text_config(read_config(directory))):
            self._prints[f"{option}_quantisation"] = scheme.name
        return ModelFiles(directory, decoder)

    def tokenizer(self, model: ModelFiles, template: Template = "auto") -> "PreTrainedTokenizerBase":
        """The tokenizer of an opened model; ``tokenizer_fingerprint`` tells equal ones in other files too.

        Raises:
          DataError: it has no such template.
        """
        chosen = with_template(model.tokenizer, template)
        if chosen is not model.tokenizer and Path(here(template)).is_file():
            self.file(Path(here(template)), "template")
        self._prints["tokenizer_fingerprint"] = tokenizer_fingerprint(chosen)
        return model.tokenizer

    def adapter(self, spec: str | Path, option: str = "adapter") -> Path:
        """A PEFT adapter's directory.

        Raises:
          CheckpointError: there is none.
        """
        directory = adapter_directory(spec)
        files = adapter_files(directory)
        self._prints[f"{option}_fingerprint"] = joined_fingerprint(self._register(option, directory, files), files)
        return directory

    def file(self, path: Path, option: str) -> Path:
        """Any other file that decides results.

        Raises:
          ChesError: it cannot be read.
        """
        if not path.is_file():
            raise ChesError(f"--{option.replace('_', '-')} {path}: no such file")
        self._prints[f"{option}_fingerprint"] = self._register(option, path.parent, [path])[path].hex()
        return path

    def pairs(
        self,
        spec: str,
        split: str | None,
        columns: Mapping[str, str],
        candidates: Pairing | None = None,
        option: str = "pairs",
        schema: str = "auto",
    ) -> PairSource:
        """Preference pairs; ``bundled`` for those of the package."""
        path = bundled.located(spec, bundled.pairs_file)
        return self._data(option, open_pairs(path, split, columns, candidates, schema, self._columns))

    def prompts(
        self,
        spec: str,
        split: str | None = None,
        columns: Mapping[str, str] | None = None,
        option: str = "prompts",
        schema: str = "auto",
    ) -> PairSource:
        """Prompts; ``bundled`` for those of the package."""
        path = bundled.located(spec, bundled.prompts_file)
        return self._data(option, open_prompts(path, split, columns, schema))

    def rows(
        self,
        spec: str,
        split: str | None,
        columns: Mapping[str, str],
        kind: Kind,
        option: str,
        schema: str = "auto",
    ) -> PairSource:
        """Rows of another kind; ``bundled`` for the pairs of the package."""
        path = bundled.located(spec, bundled.pairs_file)
        return self._data(option, open_rows(path, split, columns, kind, schema, self._columns))

    def labels(self, spec: str, option: str = "labels") -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Rows of a file as they are, with their place: what is known of rows that are written elsewhere.

        Raises:
          DataError: nothing there, an unknown format, no rows.
        """
        source = self._data(option, open_rows(spec, None, None, LABELS))
        return ((where, raw) for where, raw in source.read(0) if isinstance(raw, Mapping))

    def require_unchanged(self) -> None:
        """Compare everything opened with what lies there now: a run reads its data again and again.

        Raises:
          RunError: names what changed while the run was under way.
        """
        changed = [
            f"--{option.replace('_', '-')} {source.name}"
            for option, source in self._sources.items()
            if source.fingerprint() not in self._opened[option].values()
        ]
        changed += [str(path) for path, stat in self._stats.items() if version_mark(path) != stat]
        if changed:
            raise RunError(many("changed while the run read it; start again with a new --out", changed))

    def _data(self, option: str, source: PairSource) -> PairSource:
        digest = source.fingerprint()
        self._opened[option] = {Path(source.name).name: digest}
        self._prints[f"{DATA.get(option, option)}_fingerprint"] = digest
        self._sources[option] = source
        if source.schema is not None:
            self._schemas[option] = source.schema_record()
        return source.tolerant()

    def _register(self, option: str, folder: Path, files: list[Path]) -> dict[Path, bytes]:
        self._stats |= {path: version_mark(path) for path in files}
        digests = file_digests(files)
        self._opened[option] = {_name(path, folder): digests[path].hex() for path in files}
        return digests


def _name(path: Path, folder: Path) -> str:
    """Of a file of a directory; of weights that lie in a store their name there."""
    return path.name if is_store(path) else path.relative_to(folder).as_posix()


@dataclass(frozen=True)
class Inputs:
    """A model directory, a source of rows and the tokenizer between them."""

    model: ModelFiles
    source: PairSource
    tokenizer: PairTokenizer
    chunk_rows: int
    limit: int | None

    def chunks(
        self,
        first: int = 0,
        wanted: Callable[[int], bool] = lambda number: True,
        at_end: Callable[[int], None] = lambda number: None,
    ) -> Iterator[tuple[int, list[TokenPair]]]:
        """Numbered chunks of tokenised pairs, from chunk ``first`` on; those that are not ``mine`` are passed over.

        ``at_end`` is called with the number of all chunks when the data have come to their end.
        A chunk holds all pairs of ``chunk_rows`` rows of the data.
        The next chunk is read and tokenised in a thread while the caller works on this one.
        """
        start = first * self.chunk_rows
        rows = itertools.islice(
            self.source.rows_from(start), None if self.limit is None else max(self.limit - start, 0)
        )
        numbers = itertools.count(first)

        def following() -> tuple[int, list[TokenPair]] | None:
            for number in numbers:
                chunk = list(itertools.chain.from_iterable(itertools.islice(rows, self.chunk_rows)))
                if not chunk:
                    at_end(number)
                    return None
                if wanted(number):
                    return number, self.tokenizer(chunk)
            return None

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(following)
            while (numbered := ahead.result()) is not None:
                ahead = pool.submit(following)
                yield numbered


def open_model_and_pairs(config: "ScoreConfig", opener: Opener) -> Inputs:
    """Open and check the model directory, the tokenizer and the pairs; nothing is computed or written.

    Raises:
      ChesError: any of them is not fit.
    """
    model = opener.model(config.model)
    opener.tokenizer(model, config.template)
    source = opener.pairs(config.pairs, config.split, config.columns, config.candidates, schema=config.schema)
    tokenizer = model.pair_tokenizer(
        max_length=config.max_length, eos=config.eos, template=config.template, template_args=config.template_args
    )
    return Inputs(model, source, tokenizer, config.chunk_rows, config.limit)


def pair_tokenizer(
    tokenizer: "PreTrainedTokenizerBase",
    decoder: DecoderConfig,
    *,
    max_length: int | None,
    eos: Eos,
    template: Template,
    template_args: Mapping[str, Any] | None = None,
) -> PairTokenizer:
    """Records to token pairs as a model reads them: within its context and its vocabulary.

    Raises:
      ChesError: ``max_length`` is more than the model has positions for.
    """
    return PairTokenizer(
        tokenizer,
        max_length=sequence_length(decoder, max_length),
        eos=eos,
        vocab_size=decoder.vocab_size,
        template=template,
        template_args=template_args or {},
    )


def convention(
    eos: Eos, max_length: int | None, template: Template, template_args: Mapping[str, Any]
) -> dict[str, Any]:
    """By which rules responses are counted and written: what two tables must share to be compared."""
    rules = {"eos": eos, "max_length": max_length, "template": template}
    return rules | ({"template_args": dict(template_args)} if template_args else {})


def sequence_length(decoder: DecoderConfig, max_length: int | None) -> int:
    """Most tokens of a sequence: ``max_length``, or the model's context.

    Raises:
      ChesError: more than a model with learned positions has.
    """
    if max_length is not None and decoder.rope is None and max_length > decoder.max_positions:
        raise ChesError(
            f"--max-length {max_length}: the model has learned positions for {decoder.max_positions} tokens only"
        )
    return decoder.max_positions if max_length is None else max_length


def audit(inputs: Inputs) -> Audit:
    """The token audit of the whole data set."""
    tokenizer = inputs.tokenizer.tokenizer
    result = Audit(tokenizer.bos_token_id, tokenizer.eos_token_id)  # type: ignore[arg-type]
    for _, chunk in inputs.chunks():
        result.extend(chunk)
    return result
