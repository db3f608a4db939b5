"""Every text finds its own prompt in the stream, whatever lies there besides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ches_jax.generate import packing
from ches_jax.generate.packing import Request, apart_shape, arrays, bucket, distinct, held, packed_shape
from ches_jax.generate.sampling import key_data

PROMPTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=70), min_size=1, max_size=12)


def requests_of(prompts: list[list[int]]) -> list[Request]:
    return [Request(p, key_data(0, str(i), 0), 1 + i % 3) for i, p in enumerate(prompts)]


def check(requests: list[Request], shape: packing.Shape, parts: int) -> None:
    stream, prompts = arrays(requests, shape, parts)
    assert stream.tokens.shape == (parts * shape.stream_rows, shape.stream_length)
    assert prompts.source.shape == (shape.rows, shape.bucket)
    each = shape.stream_rows * shape.stream_length
    for i, request in enumerate(requests):
        part = i // (shape.rows // parts)
        tokens, start, longest = (a.reshape(parts, each)[part] for a in stream)
        own = prompts.source[i, prompts.first[i] :]
        assert tokens[own].tolist() == request.prompt
        # end to end in one row, which begins where the positions say
        assert np.array_equal(own, own[0] + np.arange(len(own)))
        assert own[0] // shape.stream_length == own[-1] // shape.stream_length
        assert (start[own] == own[0] % shape.stream_length).all()
        assert (longest[own] >= len(own) + request.limit).all()
        assert prompts.limit[i] == request.limit and np.array_equal(prompts.keys[i], request.key)
    assert ((prompts.source >= 0) & (prompts.source < each)).all()
    assert not prompts.limit[len(requests) :].any()
    alone = np.arange(shape.stream_length)[None] == stream.start
    assert (alone | (stream.longest > 0)).all(), "padding sees itself only"


@settings(deadline=None, max_examples=60)
@given(PROMPTS, st.sampled_from([1, 2]), st.sampled_from([40, 2048]))
def test_packed_prompts_are_found(prompts: list[list[int]], parts: int, longest_row: int):
    requests = requests_of(prompts)
    rows = -(-len(requests) // parts) * parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LONGEST_ROW", longest_row)
        shape = packed_shape([requests, requests[:1]], rows, parts)
        check(requests, shape, parts)
        check(requests[:1], shape, parts)
        each = rows // parts
        shards = [requests[a : a + each] for a in range(0, rows, each)]
        stream, _ = arrays(requests, shape, parts)
        unique = sum(len(ids) for shard in shards for ids, _ in distinct(shard))
        alone = shape.stream_rows == each and shape.stream_length == shape.bucket
        assert held(stream) == (sum(map(len, prompts)) if alone else unique)


@settings(deadline=None, max_examples=30)
@given(PROMPTS, st.sampled_from([1, 2]))
def test_prompts_in_rows_of_their_own_are_at_the_end_of_them(prompts: list[list[int]], parts: int):
    requests = requests_of(prompts)
    rows = -(-len(requests) // parts) * parts
    shape = apart_shape(rows, parts, max(map(len, prompts)))
    check(requests, shape, parts)
    stream, _ = arrays(requests, shape, parts)
    for row, prompt in zip(stream.tokens, prompts, strict=False):
        assert row[shape.bucket - len(prompt) :].tolist() == prompt


def test_shapes_are_few():
    sizes = set()
    for n in range(1, 400):
        shape = packed_shape([requests_of([[1] * 20, *([[2 + i] * 30 for i in range(n % 60)])])], 64, 1)
        sizes.add((shape.stream_rows, shape.stream_length))
        assert bucket(20) == shape.bucket
    assert len(sizes) < 24
