r"""One update: micro-batches in, new state out.

.. math:: g = \sum_m \frac{P_m}{P} \nabla \bar L_m

with the mean loss of micro-batch m over its P_m of the update's P pairs: the gradient of the mean over all pairs,
however they are cut, also where the last micro-batch is a short one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import put_replicated, put_rows
from ches_jax.losses import Loss
from ches_jax.models.attention.choose import with_gradient
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.decoder import Decoder
from ches_jax.train.batch_loss import batch_loss
from ches_jax.train.beside import Beside, Reference
from ches_jax.train.data.batches import Batch
from ches_jax.train.forward import batch_logps
from ches_jax.train.optimizer import clipped
from ches_jax.train.state import TrainState, state_shardings


def put(batch: Batch, mesh: Mesh) -> Batch:
    """The batch on the mesh's devices: rows sharded over ``data`` and ``fsdp``, what belongs to items everywhere."""
    sft = None if batch.sft is None else put(batch.sft, mesh)
    items = put_replicated(batch._replace(rows=(), sft=None), mesh)
    return items._replace(rows=put_rows(batch.rows, mesh), sft=sft)


class Frozen(NamedTuple):
    """Arrays that no update changes, by dotted name."""

    policy: dict[str, Any]
    reference: dict[str, Any]


class Step:
    """``step(state, batches)`` makes one update of one or more micro-batches; the old state is consumed.

    Four compiled functions, of which an update runs

        one micro-batch    whole                              gradient and update in one program
        several            zeros, add (once each), apply      the sum of gradients stays on the devices

    and before them, for KTO in several micro-batches, a fifth: ``excess``, the sum over a micro-batch of
    ln pi - ln pi_ref of the mismatched responses. Its mean over the *update* is the reference point that every
    example is compared with, so it is needed before the first gradient.
    """

    def __init__(
        self,
        abstract: Decoder,
        optimizer: optax.GradientTransformation,
        loss: Loss,
        example: TrainState,
        mesh: Mesh,
        *,
        frozen: Mapping[str, Any] | None = None,
        reference: Reference | None = None,
        clip: float | None = None,
        router_balance: float = 0.0,
        sft: tuple[float, Loss] | None = None,
        remat: bool = False,
    ):
        """Takes the decoder without arrays, whose dtype is that of the computation, and what no update changes.

        ``reference``: the model beside the policy, for losses that read its states. ``sft``: coefficient and loss of
        the likelihood of the other set that the batches bring; what is logged as ``loss`` is that of the pairs.
        """
        self.mesh = mesh
        self._frozen = Frozen(dict(frozen or {}), {} if reference is None else dict(reference.params))
        places = state_shardings(example, mesh)
        on = mesh if mesh.size > 1 else None
        whole_array = NamedSharding(mesh, PartitionSpec())

        def gradient(params: Any, frozen: Frozen, loss_state: Any, batch: Batch) -> tuple[Any, Any, dict[str, Any]]:
            def mean(params: Any) -> Any:
                model = with_parameters(abstract, {**frozen.policy, **params})
                beside = reference and Beside(with_parameters(reference.abstract, frozen.reference), params)
                options: dict[str, Any] = {"router_balance": router_balance, "remat": remat, "mesh": on}
                of_pairs, (means, new) = batch_loss(model, loss, batch, loss_state, beside=beside, **options)
                value, means = of_pairs, {"loss": of_pairs, **means}
                if sft is not None:
                    assert batch.sft is not None
                    coefficient, term = sft
                    of_set, _ = batch_loss(model, term, batch.sft, {}, remat=remat, mesh=on)
                    value, means = value + coefficient * of_set, {**means, "sft_pairs/loss": of_set}
                return value, (means, new)

            grads, (metrics, new) = jax.grad(mean, has_aux=True)(params)
            return grads, new, metrics

        def apply(state: TrainState, grads: Any) -> tuple[TrainState, Any]:
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in grads.values()))
            # or XLA keeps the squares of a gradient for the optimiser, a pass over memory more than to make them again
            grads = jax.lax.optimization_barrier(grads)
            if clip is not None:
                grads = clipped(grads, norm, clip)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
            return TrainState(params, opt_state, state.loss_state, state.step + 1), norm

        def whole(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
            grads, new, metrics = gradient(state.params, frozen, state.loss_state, batch)
            state, norm = apply(state._replace(loss_state=new), grads)
            return state, {**metrics, "grad_norm": norm}

        # adds the gradient of one micro-batch, weighted by its share of the update's pairs, to ``total``
        def add(params: Any, frozen: Any, loss_state: Any, batch: Batch, share: Any, total: Any) -> Any:
            grads, new, metrics = gradient(params, frozen, loss_state, batch)
            return jax.tree.map(lambda t, g: t + g * share.astype(g.dtype), total, grads), new, metrics

        # sum of the log-ratios of mismatched responses: a part of KTO's reference point
        def excess(params: Any, frozen: Any, batch: Batch) -> Any:
            model = with_parameters(abstract, {**frozen.policy, **params})
            logps = batch_logps(model, batch, attend=with_gradient(model.config, model.dtype), mesh=on)
            return jnp.sum(logps.responses[:, -1] - batch.reference[:, -1])

        # an objective that compares examples with all of their update needs it before the first micro-batch
        self._excess = jax.jit(excess, out_shardings=whole_array) if "kl_baseline" in loss.needs else None
        self._whole = jax.jit(whole, donate_argnums=0, out_shardings=(places, whole_array))
        self._zeros = jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), out_shardings=places.params)
        self._add = jax.jit(add, donate_argnums=5, out_shardings=(places.params, places.loss_state, whole_array))
        # the gradient has no successor to give its memory to
        self._apply = jax.jit(apply, donate_argnums=0, out_shardings=(places, whole_array))

    def lower(self, state: TrainState, frozen: Mapping[str, Any], batch: Batch) -> Any:
        """The program of an update of one micro-batch, for shapes with shardings."""
        return self._whole.lower(state, Frozen(dict(frozen), {}), batch)

    def _with_baseline(self, params: Any, batches: Sequence[Batch]) -> list[Batch]:
        """KTO's reference point of the whole update (``losses.kto_baseline``) in each of its micro-batches."""
        assert self._excess is not None
        total = sum(float(self._excess(params, self._frozen, put(b, self.mesh))) for b in batches)
        mean = max(0.0, total / sum(len(b.row) for b in batches))
        return [b._replace(extra={**b.extra, "kl_baseline": np.asarray(mean, b.reference.dtype)}) for b in batches]

    def __call__(self, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, dict[str, float]]:
        """One update; metrics are means over its pairs, on the host."""
        if len(batches) == 1:
            state, metrics = self._whole(state, self._frozen, put(batches[0], self.mesh))
            return state, as_floats(metrics)
        if self._excess is not None and len(batches) > 1:
            batches = self._with_baseline(state.params, batches)
        total = sum(len(b.row) for b in batches)
        shares = [len(b.row) / total for b in batches]
        loss_state, grads, collected = state.loss_state, self._zeros(state.params), []
        for batch, share in zip(batches, shares, strict=True):
            placed = put(batch, self.mesh)
            grads, loss_state, metrics = self._add(
                state.params, self._frozen, loss_state, placed, np.asarray(share, jnp.result_type(float)), grads
            )
            collected.append(metrics)
        state, norm = self._apply(state._replace(loss_state=loss_state), grads)
        on_host = [as_floats(m) for m in collected]
        mean = {k: sum(s * m[k] for s, m in zip(shares, on_host, strict=True)) for k in on_host[0]}
        return state, {**mean, "grad_norm": float(norm)}


def as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as Python numbers; waits for the device."""
    return {k: float(v) for k, v in jax.device_get(dict(metrics)).items()}
