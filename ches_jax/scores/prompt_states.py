r"""What a model makes of a prompt, as one vector: its states after the final norm, averaged, or the last of them.

.. math:: \phi_{mean}(x) = \frac1{|x|} \sum_{t=1}^{|x|} h_t, \qquad \phi_{last}(x) = h_{|x|}

the last is the state that predicts the first token of a response.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ches_jax.data.packing import doubled
from ches_jax.models.attention.choose import choose_attention
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder
from ches_jax.models.precision import accumulate

SHORTEST = 64
"""Positions of the row of a short prompt; longer ones take doubled rows, so that few programs are compiled."""
TOKENS_AT_ONCE = 4096

States = Literal["mean", "last"]


def prompt_states(
    directory: Path, config: DecoderConfig, prompts: Sequence[tuple[int, ...]], states: States, dtype: str = "float32"
) -> Float[np.ndarray, "N D"]:
    """The vector of each prompt, float64; a prompt that comes several times is computed once.

    Args:
      directory: of the model.
      config: its architecture.
      prompts: token ids, at least one each.
      states: which of the states of a prompt.
      dtype: of the computation.
    """
    with jax.enable_x64(dtype == "float64"):
        graph, weights = nnx.split(load_model(directory, dtype=dtype))
        attend = choose_attention("auto", config, dtype).attend

        @jax.jit
        def of_batch(weights: nnx.State, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
            model: Decoder = nnx.merge(graph, weights)
            inside = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
            hidden = model.hidden(tokens, mask=inside, attend=attend).astype(accumulate(dtype))
            if states == "last":
                return jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
            return jnp.sum(jnp.where(inside[..., None], hidden, 0.0), axis=1) / lengths[:, None].astype(hidden.dtype)

        found: dict[tuple[int, ...], np.ndarray] = {}
        for batch, tokens, lengths in _batches(prompts):
            values = np.asarray(of_batch(weights, tokens, lengths), np.float64)
            found |= dict(zip(batch, values, strict=False))  # rows that only fill the batch come last
    return np.stack([found[prompt] for prompt in prompts])


def _batches(prompts: Sequence[tuple[int, ...]]) -> Iterator[tuple[list[tuple[int, ...]], np.ndarray, np.ndarray]]:
    """Different prompts with their padded rows and lengths, batches of one shape for each length of a row."""
    of_length: dict[int, list[tuple[int, ...]]] = {}
    for prompt in dict.fromkeys(prompts):
        of_length.setdefault(doubled(SHORTEST, len(prompt)), []).append(prompt)
    for length, some in sorted(of_length.items()):
        count = min(max(1, TOKENS_AT_ONCE // length), len(some))
        for at in range(0, len(some), count):
            batch = some[at : at + count]
            tokens, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
            for row, prompt in enumerate(batch):
                tokens[row, : len(prompt)] = prompt
                lengths[row] = len(prompt)
            yield batch, tokens, lengths
