r"""Where the probability goes: the next-token distribution after probe prompts, at step 0 and at every evaluation.

For each prompt x, with p_0 and p_t the distributions of the first token of a response at step 0 and now:

.. math:: H = -\sum_v p_t(v) \ln p_t(v), \qquad \max_v p_t(v), \qquad TV = \frac12 \sum_v |p_t(v) - p_0(v)|

and the tokens that gained and lost most. Entropy in nats; probabilities and total variation without unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.data.render import Writer
from ches_jax.data.tokenize import encode_prompts
from ches_jax.distributed.mesh import row_shards
from ches_jax.errors import DataError
from ches_jax.inputs import ModelFiles, Opener
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import Attend
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.decoder import Decoder
from ches_jax.train.observe.evaluations import join, part, write_table
from ches_jax.train.observe.observer import Params
from ches_jax.types import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOP = 10
"""Tokens that are listed on either side."""
TILE = 64
"""Prompts are padded to a multiple of so many tokens."""
AT_ONCE = 64
"""Prompts of a pass."""
FILE_NAME = "probes.parquet"
PARTS = "probes"
MOVED = pa.list_(
    pa.struct([("token", pa.int32()), ("text", pa.string()), ("before", pa.float64()), ("now", pa.float64())])
)
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32()),
        pa.field("index", pa.int64()),
        pa.field("row_id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("entropy", pa.float64()),
        pa.field("argmax_mass", pa.float64()),
        pa.field("argmax_token", pa.int32()),
        pa.field("argmax_text", pa.string()),
        pa.field("total_variation", pa.float64()),
        pa.field("gaining", MOVED),
        pa.field("losing", MOVED),
    ]
)
"""One row per prompt and evaluation; ``gaining`` and ``losing`` begin with the token that moved most."""


@dataclass(frozen=True)
class Probes:
    """Prompts as token ids, and what tells their tokens."""

    tokenizer: "PreTrainedTokenizerBase"
    ids: list[tuple[int, ...]]
    row_ids: list[str]

    def text(self, ids: Sequence[int]) -> str:
        """What the tokens say."""
        return str(self.tokenizer.decode(list(ids)))


def read_probes(
    spec: str,
    model: ModelFiles,
    opener: Opener,
    *,
    template: Template,
    template_args: Mapping[str, Any],
    max_length: int | None,
) -> Probes:
    """The prompts of a file or data set; ``bundled`` for those of the package.

    Raises:
      DataError: prompts that cannot be read, are empty, or too long for the model.
    """
    source = opener.prompts(spec, option="probes")
    rows = list(source)
    ids = [p.ids for p in encode_prompts(Writer.of(model.tokenizer, template, template_args), rows)]
    longest = max_length or model.decoder.max_positions
    for row, prompt in zip(rows, ids, strict=True):
        if not 0 < len(prompt) < longest or max(prompt) >= model.decoder.vocab_size:
            raise DataError(
                f"--probes {source.name}, {row.where}: a prompt of {len(prompt)} tokens; expected 1 to {longest - 1}, "
                f"of ids below {model.decoder.vocab_size}"
            )
    if not rows:
        raise DataError(f"--probes {source.name}: has no prompts")
    return Probes(model.tokenizer, ids, [row.row_id for row in rows])


class Prober:
    """``prober(params)`` gives the next-token log-probabilities after every prompt; compiles once."""

    def __init__(self, abstract: Decoder, mesh: Mesh, probes: Probes, attend: Attend = blocks):
        """Takes the decoder without arrays; parameters come with each call."""
        self._probes = probes
        self._whole = NamedSharding(mesh, PartitionSpec())
        shards = row_shards(mesh)
        self._rows = -(-min(AT_ONCE, len(probes.ids)) // shards) * shards
        self._length = -(-max(map(len, probes.ids)) // TILE) * TILE
        on = mesh if mesh.size > 1 else None

        def run(params: Any, tokens: Any, lengths: Any) -> Any:
            model = with_parameters(abstract, params)
            mask = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
            hidden = model.hidden(tokens, mask=mask, attend=attend, mesh=on)
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
            return jax.nn.log_softmax(model.logits(last), axis=-1)

        self._run = jax.jit(run, out_shardings=self._whole)

    def __call__(self, params: Any) -> np.ndarray:
        """[prompts, vocabulary] log-probabilities in nats, float32 (float64 in float64)."""
        parts = []
        for at in range(0, len(self._probes.ids), self._rows):
            some = self._probes.ids[at : at + self._rows]
            tokens, lengths = np.zeros((self._rows, self._length), np.int32), np.ones(self._rows, np.int32)
            for row, ids in enumerate(some):
                tokens[row, : len(ids)], lengths[row] = ids, len(ids)
            here = jax.device_put((tokens, lengths), self._whole)
            parts.append(np.asarray(self._run(params, *here))[: len(some)])
        return np.concatenate(parts)


def entropy(logps: np.ndarray) -> np.ndarray:
    """Of each distribution, in nats."""
    wide = logps.astype(np.float64)
    # a token of probability 0 adds 0, not 0 times minus infinity
    return -np.sum(np.exp(wide) * np.where(np.isfinite(wide), wide, 0), axis=-1)


def moved(before: np.ndarray, now: np.ndarray, top: int = TOP) -> tuple[list[int], list[int]]:
    """Tokens whose probability rose and fell most, the largest change first; ties by token id.

    >>> moved(np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6]))
    ([2], [0])
    """
    change = now - before
    out = []
    for sign in (1, -1):
        order = np.argsort(-sign * change, kind="stable")[:top]
        out.append([int(v) for v in order if sign * change[v] > 0])
    return out[0], out[1]


class ProbeLog:
    """The log of a run's probes: one part per evaluation, joined at the end."""

    def __init__(self, out: Path, probes: Probes, start: np.ndarray, *, write: bool = True):
        """Takes the log-probabilities of step 0; ``write``: whether this process keeps the log."""
        self.out = out
        self._probes = probes
        self._start = np.exp(start.astype(np.float64))
        self.write = write

    def record(self, step: int, logps: np.ndarray) -> dict[str, float]:
        """Write one evaluation; returns means over the prompts, under ``displacement/probe_*``."""
        now = np.exp(logps.astype(np.float64))
        best = now.argmax(-1)
        columns: Mapping[str, Any] = {
            "step": [step] * len(now),
            "index": range(len(now)),
            "row_id": self._probes.row_ids,
            "prompt": [self._probes.text(ids) for ids in self._probes.ids],
            "entropy": entropy(logps),
            "argmax_mass": now.max(-1),
            "argmax_token": best,
            "argmax_text": [self._probes.text([v]) for v in best.tolist()],
            "total_variation": 0.5 * np.abs(now - self._start).sum(-1),
        }
        sides = [moved(a, b) for a, b in zip(self._start, now, strict=True)]
        tokens = {"gaining": [s[0] for s in sides], "losing": [s[1] for s in sides]}
        columns |= {k: [self._changes(i, v, now) for i, v in enumerate(watched)] for k, watched in tokens.items()}
        if self.write:
            table = pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)
            write_table(table, part(self.out / PARTS, step))
        means = {f"probe_{k}": float(np.mean(columns[k])) for k in ("entropy", "argmax_mass", "total_variation")}
        means["probe_argmax_changed"] = float(np.mean(best != self._start.argmax(-1)))
        return {f"displacement/{k}": v for k, v in means.items()}

    def _changes(self, prompt: int, tokens: Sequence[int], now: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"token": v, "text": self._probes.text([v]), "before": self._start[prompt, v], "now": now[prompt, v]}
            for v in tokens
        ]

    def join(self) -> Path:
        """All evaluations in one file, in order of steps."""
        return join(self.out / PARTS, self.out / FILE_NAME)


@dataclass(frozen=True)
class ProbeObserver:
    """Follows the next-token distributions after the probe prompts."""

    every: int | None
    prober: Prober
    log: ProbeLog

    def observe(self, step: int, params: Params) -> dict[str, float]:
        """``displacement/probe_*``: means over the prompts."""
        return self.log.record(step, self.prober(params))

    def close(self) -> None:
        """Join the parts."""
        if self.log.write:
            self.log.join()
