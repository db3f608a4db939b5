"""``Pull`` and ``Push`` over data sets: items in packed rows that share the prompt, one batch on the device at a time.

Memory on the device does not grow with the number of items: a pull adds the gradient of each batch to one tree like the
parameters, a push hands out the numbers of each batch. Both compile once for each shape of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ches_jax.data.packing import BatchPlan, Item, PackedBatch, Placement, plan_batches, responses_of, write_batch
from ches_jax.distributed.mesh import put_own_rows, put_rows, row_shards
from ches_jax.forecast.linear import pull, push, push_twice
from ches_jax.forecast.model import Model
from ches_jax.models.precision import accumulate
from ches_jax.models.sharding import placement
from ches_jax.train.data.batches import Layout, local_rows, most_predictions, stepped, without_empty_room

BATCH_TOKENS = {"cpu": 4096}
MANY_BATCH_TOKENS = 32768
FEW = 8

Tree = dict[str, jax.Array]
PerItem = list[np.ndarray]
"""For each item a number for each of its responses, float64."""


class Derivatives(NamedTuple):
    """What a push knows of every response, for each item [R], float64."""

    logps: PerItem
    """Nats."""
    first: PerItem
    """Derivative along the direction."""
    second: PerItem | None = None
    """Second derivative along it."""


class Rows:
    """How items become batches of packed rows of one shape."""

    def __init__(self, layout: Layout, mesh: Any, batch_tokens: int | None = None, fit: Sequence[Item] = ()):
        """Rows with room for the predictions of ``fit``; ``batch_tokens`` are the positions of a batch for a device."""
        self.layout, self.mesh = layout, mesh
        tokens = batch_tokens or BATCH_TOKENS.get(jax.default_backend(), MANY_BATCH_TOKENS)
        self.rows = max(1, tokens // layout.row_tokens) * row_shards(mesh)
        # one program for all sets: they differ by a few predictions, and a program costs seconds
        used = [most_predictions(fit, plan, layout) for plan in self._plans(fit) if plan.length == layout.row_tokens]
        self.room = stepped(max(used, default=0))

    def batches(self, items: Sequence[Item], *, even: bool = False) -> Iterator[tuple[PackedBatch, list[Placement]]]:
        """Batches that hold every item once.

        ``even``: as many, with their rows spread evenly; one more program to compile, and no batch that is half empty.
        """
        layout = self.layout
        for plan in self._plans(items, self._even_rows(items) if even else None):
            rows = write_batch(items, plan, layout.eos, layout.length_threshold, local_rows(plan.row_count, layout))
            used, room = most_predictions(items, plan, layout), self.room if plan.length == layout.row_tokens else 0
            yield without_empty_room(rows, plan.length, used, room), plan.placements()

    def _even_rows(self, items: Sequence[Item]) -> int | None:
        """Rows of each standard batch, so that all have about the same number."""
        used = [len(plan.rows) for plan in self._plans(items) if plan.length == self.layout.row_tokens]
        return -(-sum(used) // len(used)) if used else None

    def _plans(self, items: Sequence[Item], rows: int | None = None) -> Iterator[BatchPlan]:
        # a single pair, such as that of an experiment, is spared a full batch
        most = min(self.rows, FEW) if len(items) <= FEW else self.rows
        return plan_batches(
            items,
            length=self.layout.row_tokens,
            rows_per_batch=rows or most,
            row_multiple=row_shards(self.mesh),
            length_threshold=self.layout.length_threshold,
        )


def read_segments(sums: np.ndarray, places: Sequence[Placement], found: PerItem) -> None:
    """Puts the numbers of responses, shared part and own part, from those of segments, [B, S]."""
    for p in places:
        found[p.item][:] = sums[p.row, p.shared] + sums[p.row, p.shared + 1 : p.shared + p.segments]


def write_segments(coefficients: PerItem, places: Sequence[Placement], shape: tuple[int, int]) -> np.ndarray:
    """The transpose of ``read_segments``: coefficients of segments, [B, S], from those of responses."""
    sums = np.zeros(shape)
    for p in places:
        sums[p.row, p.shared] = coefficients[p.item].sum()
        sums[p.row, p.shared + 1 : p.shared + p.segments] = coefficients[p.item]
    return sums


def empty_like_responses(items: Sequence[Item]) -> PerItem:
    """NaN for each response of each item."""
    return [np.full(len(responses_of(item)), np.nan) for item in items]


class Pull:
    """``pull(params, items, coefficients)``: the gradient of the weighted sum of their log-probabilities."""

    def __init__(self, model: Model, rows: Rows):
        """Compiles at the first batch of each shape."""
        self.model, self.rows = model, rows

        def add(params: Tree, frozen: Tree, batch: PackedBatch, coefficients: jax.Array, total: Tree) -> Tree:
            found = pull(lambda p: model.backward(p, frozen, batch), params, coefficients)[1]
            return {k: v + found[k].astype(v.dtype) for k, v in total.items()}

        self._add = jax.jit(add, donate_argnums=4)

    def __call__(self, params: Tree, items: Sequence[Item], coefficients: PerItem, *, even: bool = False) -> Tree:
        """A tree like ``params``, summed in float32 at least.

        Args:
          params: where.
          items: a prompt and its responses each; a pair has two, the chosen one first.
          coefficients: for each item [R].
          even: spread the rows evenly (``Rows.batches``); for a set that is pulled once.
        """
        total = wide_zeros(params)
        dtype = np.float64 if jax.config.read("jax_enable_x64") else np.float32
        for batch, places in self.rows.batches(items, even=even):
            placed = put_rows(batch, self.rows.mesh)
            # the places number the rows of all processes, as the placed batch has them
            weights = write_segments(coefficients, places, placed.last.shape).astype(dtype)
            total = self._add(params, self.model.frozen, placed, put_own_rows(weights, self.rows.mesh), total)
        return total


class Push:
    """``push(params, direction, items)``: how every response's log-probability changes along a direction."""

    def __init__(self, model: Model, rows: Rows, order: int = 1):
        """``order`` 2 computes second derivatives too."""
        self.model, self.rows, self.order = model, rows, order
        compute = push if order == 1 else push_twice

        def run(params: Tree, frozen: Tree, direction: Tree, batch: PackedBatch) -> tuple[jax.Array, ...]:
            return compute(lambda p: model.forward(p, frozen, batch), params, direction)

        self._run = jax.jit(run, out_shardings=NamedSharding(rows.mesh, PartitionSpec()))

    def __call__(self, params: Tree, direction: Tree, items: Sequence[Item]) -> Derivatives:
        """Log-probabilities and their derivatives."""
        found = [empty_like_responses(items) for _ in range(1 + self.order)]
        direction = {k: u.astype(params[k].dtype) for k, u in direction.items()}
        for batch, places in self.rows.batches(items):
            numbers = self._run(params, self.model.frozen, direction, put_rows(batch, self.rows.mesh))
            for sums, where in zip(jax.device_get(numbers), found, strict=True):
                read_segments(np.asarray(sums, np.float64), places, where)
        return Derivatives(*found)


class Measure:
    """``measure(params, items)``: the log-probability of every response, in nats, for each item [R]."""

    def __init__(self, model: Model, rows: Rows):
        """Compiles at the first batch of each shape."""
        self.model, self.rows = model, rows
        self._run = jax.jit(model.forward, out_shardings=NamedSharding(rows.mesh, PartitionSpec()))

    def __call__(self, params: Tree, items: Sequence[Item]) -> PerItem:
        """Log-probabilities under ``params``."""
        found = empty_like_responses(items)
        for batch, places in self.rows.batches(items):
            sums = self._run(params, self.model.frozen, put_rows(batch, self.rows.mesh))
            read_segments(np.asarray(sums, np.float64), places, found)
        return found


def wide_zeros(params: Tree) -> Tree:
    """Zeros like parameters, in float32 at least, where they lie."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, accumulate(p.dtype)), params)


def on_mesh(tree: Mapping[str, Any], mesh: Any) -> Tree:
    """A tree of arrays by parameters' names, placed as parameters are."""
    place = placement(mesh)
    return {
        name: jax.make_array_from_callback(a.shape, place(name, a.shape), lambda part, a=a: a[part])
        for name, a in tree.items()
    }
