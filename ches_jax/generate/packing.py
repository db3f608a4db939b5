"""Requests to the arrays that a batch is made of: prompts packed in rows, each once, and where each text finds its own.

Prompts lie end to end in a *stream* of one row, or of several where they are more than ``LONGEST_ROW`` tokens, as pairs
do in ``data.packing``; equal prompts, as of several samples, lie there once. Every text then has its own room in the
cache: keys and values of its prompt are copied there (``Prompts.source``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ches_jax.data.packing import first_fit_decreasing
from ches_jax.generate.sampling import WORDS

SMALLEST_BUCKET = 32
LONGEST_ROW = 2048
"""Tokens of a row of the stream, unless one prompt is longer."""


class Stream(NamedTuple):
    """Prompts as the model reads them, R rows of T tokens; numpy or jax arrays, int32 [R, T]."""

    tokens: Any
    start: Any
    """Index of the first token of the prompt that a position belongs to; its own where it is padding."""
    longest: Any
    """Tokens that the text of the prompt can have; 0 where it is padding."""


class Prompts(NamedTuple):
    """A batch of texts to make; numpy or jax arrays. A row with limit 0 only fills the batch."""

    source: Any
    """int32 [B, P]: where in the stream, row after row, the token of each slot is; something before ``first``."""
    first: Any
    """int32 [B]: slot of the first token."""
    limit: Any
    """int32 [B]: most tokens to make."""
    keys: Any
    """uint32 [B, W]: data of the row's PRNG key (``sampling.key_data``)."""


@dataclass(frozen=True)
class Request:
    """One text to make."""

    prompt: Sequence[int]
    key: np.ndarray
    """uint32 [W]: data of the PRNG key (``sampling.key_data``)."""
    limit: int


@dataclass(frozen=True)
class Shape:
    """What a batch is compiled for."""

    rows: int
    """Texts, over all shards."""
    bucket: int
    """Slots of a prompt."""
    stream_rows: int
    """Of each shard."""
    stream_length: int


def bucket(length: int) -> int:
    """The length a prompt is padded to in the cache.

    >>> [bucket(n) for n in (1, 32, 33, 700)]
    [32, 32, 64, 1024]
    """
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def rounded(count: int) -> int:
    """The least number of at most three binary digits, zeros behind them left out, that is not less: few shapes.

    >>> [rounded(n) for n in (1, 5, 7, 9, 17, 33, 100)]
    [1, 5, 7, 10, 20, 40, 112]
    """
    unit = 1 << max(count.bit_length() - 3, 0)
    return -(-count // unit) * unit


def distinct(requests: Sequence[Request]) -> list[tuple[tuple[int, ...], int]]:
    """The prompts of the requests, each once, with the longest text that is made of it; in order.

    >>> key = np.zeros(4, np.uint32)
    >>> distinct([Request([1, 2], key, 5), Request([3], key, 5), Request([1, 2], key, 7)])
    [((1, 2), 9), ((3,), 6)]
    """
    longest: dict[tuple[int, ...], int] = {}
    for request in requests:
        ids = tuple(request.prompt)
        longest[ids] = max(longest.get(ids, 0), len(ids) + request.limit)
    return list(longest.items())


def in_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Numbers of the prompts of each row of the stream."""
    return first_fit_decreasing(lengths, row_length, max_pairs=len(lengths))


def apart_shape(rows: int, parts: int, longest: int) -> Shape:
    """The shape of a batch each of whose prompts has a row of the stream for itself."""
    return Shape(rows, bucket(longest), rows // parts, bucket(longest))


def packed_shape(batches: Sequence[Sequence[Request]], rows: int, parts: int) -> Shape:
    """The shape that holds each of the batches, whose longest prompts are of one bucket, packed."""
    shards = [part for batch in batches for part in _parts(batch, rows, parts)]
    size = bucket(max(len(request.prompt) for batch in batches for request in batch))
    lengths = [[len(ids) for ids, _ in distinct(part)] for part in shards]
    most = max(map(sum, lengths))
    if most <= LONGEST_ROW:
        return Shape(rows, size, 1, rounded(-(-most // SMALLEST_BUCKET)) * SMALLEST_BUCKET)
    length = max(LONGEST_ROW, size)
    return Shape(rows, size, rounded(max(len(in_rows(some, length)) for some in lengths)), length)


def arrays(requests: Sequence[Request], shape: Shape, parts: int) -> tuple[Stream, Prompts]:
    """The arrays of a batch, shard after shard; ``source`` counts from the first row of the shard."""
    made = [_shard(part, shape, shape.rows // parts) for part in _parts(requests, shape.rows, parts)]
    streams, prompts = zip(*made, strict=True)
    return Stream(*map(np.concatenate, zip(*streams, strict=True))), Prompts(
        *map(np.concatenate, zip(*prompts, strict=True))
    )


def held(stream: Stream) -> int:
    """How many positions of the stream are of a prompt."""
    return int((stream.longest > 0).sum())


def _parts(requests: Sequence[Request], rows: int, parts: int) -> list[Sequence[Request]]:
    each = rows // parts
    return [requests[a : a + each] for a in range(0, rows, each)]


def _shard(requests: Sequence[Request], shape: Shape, rows: int) -> tuple[Stream, Prompts]:
    """The arrays of one shard; where there is a row for each text, its prompt is at the end of that."""
    length = shape.stream_length
    alone = shape.stream_rows == rows and length == shape.bucket
    some = [(tuple(r.prompt), len(r.prompt) + r.limit) for r in requests] if alone else distinct(requests)
    members = [[i] for i in range(len(some))] if alone else in_rows([len(ids) for ids, _ in some], length)
    tokens, start, longest = (np.zeros((shape.stream_rows, length), np.int32) for _ in range(3))
    start[:] = np.arange(length)
    ends: dict[tuple[int, ...], int] = {}
    for row, of_row in enumerate(members):
        at = length - len(some[row][0]) if alone else 0
        for ids, most in (some[i] for i in of_row):
            end = at + len(ids)
            tokens[row, at:end], start[row, at:end], longest[row, at:end] = ids, at, most
            ends[ids], at = row * length + end, end
    each = [(i + 1) * length if alone else ends[tuple(r.prompt)] for i, r in enumerate(requests)]
    return Stream(tokens, start, longest), _prompts(requests, each, shape.bucket, rows)


def _prompts(requests: Sequence[Request], ends: Sequence[int], size: int, rows: int) -> Prompts:
    slots = np.arange(size, dtype=np.int32)
    source = np.zeros((rows, size), np.int32)
    first = np.full(rows, size - 1, np.int32)  # a row that fills the batch is one token long
    limit = np.zeros(rows, np.int32)
    keys = np.zeros((rows, WORDS), np.uint32)
    for i, (request, end) in enumerate(zip(requests, ends, strict=True)):
        source[i] = np.maximum(end - size + slots, 0)
        first[i], limit[i], keys[i] = size - len(request.prompt), request.limit, request.key
    return Prompts(source, first, limit, keys)
