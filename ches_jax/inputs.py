"""What a run reads, opened and checked before anything is computed or written; rows as chunks of token pairs."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ches_jax import bundled
from ches_jax.data.audit import Audit
from ches_jax.data.sources import PairSource, open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
from ches_jax.errors import ChesError
from ches_jax.hf.directory import read_config, resolve
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.registry import decoder_config
from ches_jax.scores.config import ScoreConfig
from ches_jax.types import Eos, Template, TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """A model directory, a source of rows and the tokenizer between them."""

    directory: Path
    decoder: DecoderConfig
    source: PairSource
    tokenizer: PairTokenizer
    chunk_rows: int
    limit: int | None

    def chunks(
        self, first: int = 0, mine: Callable[[int], bool] = lambda number: True
    ) -> Iterator[tuple[int, list[TokenPair]]]:
        """Numbered chunks of tokenised pairs, from chunk ``first`` on; those that are not ``mine`` are passed over.

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
                    return None
                if mine(number):
                    return number, self.tokenizer(chunk)
            return None

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(following)
            while (numbered := ahead.result()) is not None:
                ahead = pool.submit(following)
                yield numbered


def prepare(config: ScoreConfig) -> Inputs:
    """Open and check the model directory, the tokenizer and the pairs; nothing is computed or written."""
    directory = resolve(config.model)
    decoder = decoder_config(read_config(directory), str(directory))
    pairs = bundled.located(config.pairs, bundled.pairs_file)
    source = open_pairs(pairs, config.split, config.columns, config.candidates)
    tokenizer = pair_tokenizer(
        load_tokenizer(directory), decoder, max_length=config.max_length, eos=config.eos, template=config.template
    )
    return Inputs(directory, decoder, source, tokenizer, config.chunk_rows, config.limit)


def pair_tokenizer(
    tokenizer: "PreTrainedTokenizerBase",
    decoder: DecoderConfig,
    *,
    max_length: int | None,
    eos: Eos,
    template: Template,
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
    )


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
