"""What tests of several folders share."""

import math

import numpy as np


def rounding_of_the_first_loss(logged: dict[str, float], beta: float = 0.1) -> float:
    """How far from ln 2 the loss of a policy that is the reference may be in float32.

    The loss is ln 2 - beta / 2 times a margin that is zero but for the rounding of four log-probabilities, each a sum
    of float32 numbers as large as itself: a few units in the last place of their sizes. (Two programs compute them, one
    for policy and one for reference, so they may round differently, and do on processors without AVX-512.)
    """
    sizes = 2 * (abs(logged["logps/chosen"]) + abs(logged["logps/rejected"]))
    return beta / 2 * 8 * float(np.finfo(np.float32).eps) * sizes


def starts_at_the_reference(logged: dict[str, float]) -> bool:
    """Whether the first logged loss is ln 2, as far as float32 can tell."""
    return abs(logged["loss"] - math.log(2)) <= rounding_of_the_first_loss(logged)
