"""A model as the two passes see it: which parameters move, and log-probabilities of packed rows in both modes.

``backward`` is what training takes its gradients of. Three of its parts have a backward pass of their own and so no
forward mode: the log-probabilities in chunks, the matrix products of trained weights, attention in blocks. ``forward``
puts a part with a forward mode in the place of each; both compute the same numbers to rounding.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from ches_jax.data.packing import PackedBatch, empty_batch
from ches_jax.errors import ChesError
from ches_jax.inputs import ModelFiles
from ches_jax.models.attention.choose import in_forward_mode, with_gradient
from ches_jax.models.attention.dense import Attend
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.decoder import Decoder, abstract_decoder
from ches_jax.models.logprobs import forward_token_logps
from ches_jax.train.forward import segment_logps
from ches_jax.train.policy import Lora, make_policy
from ches_jax.train.setup import load_parameters, master_dtype


@dataclass(frozen=True)
class Model:
    """Log-probabilities of the segments of packed rows, [B, S] in nats, as functions of what is trained."""

    trained: Decoder
    """Without arrays; for gradients."""
    plain: Decoder
    """Without arrays; for forward mode."""
    frozen: dict[str, Array]
    """Parameters that no update changes, by dotted name."""
    mesh: Mesh
    remat: bool = False
    attend: Attend | None = None
    """Attention of the forward mode; None: what the platform has."""

    @property
    def on(self) -> Mesh | None:
        """The mesh, where there is more than one device."""
        return self.mesh if self.mesh.size > 1 else None

    def backward(self, params: Any, frozen: Any, rows: PackedBatch) -> Array:
        """For ``pull``."""
        model = with_parameters(self.trained, {**frozen, **params})
        attend = with_gradient(model.config, model.dtype)
        return segment_logps(model, rows, attend=attend, remat=self.remat, mesh=self.on)

    def forward(self, params: Any, frozen: Any, rows: PackedBatch) -> Array:
        """For ``push``."""
        model = with_parameters(self.plain, {**frozen, **params})
        return segment_logps(
            model, rows, per_token=forward_token_logps, attend=self.attend or in_forward_mode(), mesh=self.on
        )


def open_model(
    files: ModelFiles, mesh: Mesh, *, dtype: str, remat: bool, lora: Lora | None = None, seed: int = 0
) -> tuple[Model, dict[str, Array]]:
    """A model, and the parameters that a run would train, as they start.

    Args:
      files: where it is.
      mesh: where it goes.
      dtype: of the computation; parameters are trained in float32 at least.
      remat: compute layers again in the backward pass.
      lora: adapters that are trained in the place of the weights.
      seed: of the adapters' start.

    Raises:
      ChesError: weights that cannot be read; a model without a forward mode.
    """
    master = master_dtype(dtype)
    loaded = load_parameters(files.directory, dtype, master if lora is None else None, mesh)
    policy, params = make_policy(loaded, files.decoder, lora, dtype=dtype, master=master, seed=seed, mesh=mesh)
    plain = policy.abstract
    if lora is None:
        plain = abstract_decoder(files.decoder, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(master))
    model = Model(policy.abstract, plain, policy.frozen, mesh, remat)
    require_forward_mode(model, params, str(files.directory))
    return model, params


def require_forward_mode(model: Model, params: dict[str, Array], name: str) -> None:
    """Refuse a model that forward mode cannot pass; nothing is computed.

    Raises:
      ChesError: names the model and what stops it.
    """
    rows = empty_batch(model.mesh.size, 64)

    def logps(params: Any, frozen: Any, rows: Any, along: Any) -> Any:
        return jax.jvp(lambda q: model.forward(q, frozen, rows), (params,), (along,))

    try:
        # lowered, not only traced: a function with a backward pass of its own refuses where it is lowered
        jax.jit(logps).lower(params, model.frozen, rows, params)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise ChesError(
            f"{name}: this model has no forward mode, which a forecast needs ({str(error).splitlines()[0]}); "
            "a pilot (`ches train --steps N`) measures what it would forecast"
        ) from None
