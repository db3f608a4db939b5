"""Which tokens of two responses differ: those outside a longest alignment, by the edit distance of their tokens.

chosen     the cat sat  on the mat      1 where the other response has no such token in that place
rejected   the dog sat  on a   mat
masks      0   1   0    0  1   0
"""

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein


def differing_spans(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the tokens that a shortest edit from one response to the other touches, 1 where it does.

    >>> masks = differing_spans([1, 2, 3, 4], [1, 9, 3, 4, 5])
    >>> [mask.tolist() for mask in masks]
    [[0, 1, 0, 0], [0, 1, 0, 0, 1]]
    """
    masks = np.zeros(len(chosen), np.int32), np.zeros(len(rejected), np.int32)
    for tag, a, b, c, d in Levenshtein.opcodes(list(chosen), list(rejected)):
        if tag != "equal":
            masks[0][a:b] = masks[1][c:d] = 1
    return masks
