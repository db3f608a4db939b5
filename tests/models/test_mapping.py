"""Views read any slice a device may hold, and write what they read."""

from typing import Any, cast

import numpy as np
import pytest

from ches_jax.models.checkpoint.tensor_map import WHOLE, Interleaved, RowSlice, TransposedSlice, View, resolved


class Stored:
    """A tensor in memory with the interface of one in a file."""

    def __init__(self, value: np.ndarray):
        self.value = value
        self.shape = value.shape

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.value[index]


def parts(value: np.ndarray) -> list[tuple[slice, ...]]:
    """Everything, and the halves that two devices would hold along each axis."""
    whole = tuple(slice(None) for _ in value.shape)
    halves = []
    for axis, n in enumerate(value.shape):
        for cut in (slice(0, n // 2), slice(n // 2, None)):
            halves.append((*whole[:axis], cut, *whole[axis + 1 :]))
    return [whole, *halves]


def group(views: list[View], shapes: list[tuple[int, ...]]) -> None:
    """Parameters that share one tensor: write them all, read each back in every part."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in shapes]
    tensor_shape = views[0].tensor_shape(shapes[0])
    assert {v.tensor_shape(s) for v, s in zip(views, shapes, strict=True)} == {tensor_shape}
    out = np.full(tensor_shape, np.nan)
    for view, value in zip(views, values, strict=True):
        view.write(out, value)
    assert np.isfinite(out).all()
    for view, value in zip(views, values, strict=True):
        for index in parts(value):
            read = view.read(cast(Any, Stored(out)), resolved(index, value.shape))
            np.testing.assert_array_equal(read, value[index])


@pytest.mark.parametrize(
    ("views", "shapes"),
    [
        ([WHOLE], [(5, 3)]),
        ([RowSlice(0, 12), RowSlice(6, 12), RowSlice(9, 12)], [(6, 5), (3, 5), (3, 5)]),
        ([RowSlice(0, 9), RowSlice(3, 9), RowSlice(6, 9)], [(3,)] * 3),
        ([TransposedSlice(0, 7)], [(7, 5)]),
        ([TransposedSlice(i * 4, 12) for i in range(3)], [(4, 5)] * 3),
        ([Interleaved((2, 2, 2), (i,)) for i in range(3)], [(6, 5)] * 3),
        ([Interleaved((4, 4, 4), (i,)) for i in range(3)], [(12,)] * 3),
        ([Interleaved((2, 1, 4, 4), (0, 1, 2)), Interleaved((2, 1, 4, 4), (3,))], [(21, 3), (12, 3)]),
    ],
    ids=[
        "whole",
        "rows",
        "row_bias",
        "transposed",
        "fused_transposed",
        "interleaved",
        "interleaved_bias",
        "interleaved_several",
    ],
)
def test_views_write_and_read_back_every_part(views: list[View], shapes: list[tuple[int, ...]]):
    group(views, shapes)


def test_interleaved_is_head_by_head():
    """GPT-NeoX: [heads, (q, k, v), channels] flattened."""
    stored = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    keys = Interleaved((4, 4, 4), (1,)).read(cast(Any, Stored(stored.reshape(-1))), (slice(0, 8, 1),))
    np.testing.assert_array_equal(keys, stored[:, 1].reshape(-1))
