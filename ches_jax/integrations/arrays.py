"""Held-out pairs as arrays, measured with anyone's model in JAX: what the hooks of JAX trainers share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ches_jax.errors import ChesError


@dataclass(frozen=True)
class HeldOutPairs:
    """Token ids of prompt and response, and which of them are the response; padding on the right.

    >>> pairs = HeldOutPairs.of([([1, 2], [3], [4, 5])])
    >>> pairs.ids.tolist(), pairs.response.astype(int).tolist()
    ([[[1, 2, 3, 0], [1, 2, 4, 5]]], [[[0, 0, 1, 0], [0, 0, 1, 1]]])
    """

    ids: np.ndarray
    """[pairs, 2, length] int32, chosen and rejected."""
    response: np.ndarray
    """[pairs, 2, length] bool."""

    @classmethod
    def of(
        cls,
        pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
        pad: int = 0,
        length: int | None = None,
    ) -> "HeldOutPairs":
        """From (prompt, chosen, rejected) as token ids; ``length``: of all rows, default that of the longest.

        Raises:
          ChesError: no pairs, an empty prompt or response, or a pair longer than ``length``.
        """
        if not pairs or any(not len(part) for pair in pairs for part in pair):
            raise ChesError("held-out pairs: expected (prompt, chosen, rejected) as token ids, none of them empty")
        longest = max(len(prompt) + max(len(a), len(b)) for prompt, a, b in pairs)
        if length is not None and longest > length:
            raise ChesError(f"held-out pairs: the longest has {longest} tokens, more than {length}")
        ids = np.full((len(pairs), 2, length or longest), pad, np.int32)
        response = np.zeros(ids.shape, bool)
        for i, (prompt, *sides) in enumerate(pairs):
            for k, side in enumerate(sides):
                ids[i, k, : len(prompt) + len(side)] = [*prompt, *side]
                response[i, k, len(prompt) : len(prompt) + len(side)] = True
        return cls(ids, response)

    @property
    def tokens(self) -> np.ndarray:
        """[pairs, 2]: tokens of each response."""
        return self.response.sum(-1)

    def logps(self, logits_of: Callable[[Any], Any], batch: int = 8) -> np.ndarray:
        r"""Log-probabilities of the responses, [pairs, 2], nats: :math:`\sum_t \ln \pi(y_t | x, y_{<t})`.

        Args:
          logits_of: from token ids [rows, length] to logits [rows, length, vocabulary] of a causal model, best jitted
            by its owner with the parameters as an argument, so that it is compiled once.
          batch: rows at a time.
        """
        ids, response = (x.reshape(-1, x.shape[-1]) for x in (self.ids, self.response))
        short = -len(ids) % batch  # whole batches, so that one program serves all
        ids, response = (np.concatenate([x, x[:1].repeat(short, 0)]) for x in (ids, response))
        sums = _sums_of_responses()
        parts = [
            np.asarray(sums(logits_of(ids[i : i + batch]), ids[i : i + batch], response[i : i + batch]))
            for i in range(0, len(ids), batch)
        ]
        return np.concatenate(parts)[: len(ids) - short].reshape(-1, 2).astype(np.float64)


@cache
def _sums_of_responses() -> Callable[[Any, Any, Any], Any]:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def sums(logits: Any, ids: Any, response: Any) -> Any:
        each = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        picked = jnp.take_along_axis(each, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.where(response[:, 1:], picked, 0.0).sum(-1)

    return sums
