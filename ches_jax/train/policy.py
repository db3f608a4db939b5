"""The policy of a run: which parameters are trained, and which stay as they were loaded.

In full training every weight is trained, in the master dtype. With LoRA the weights stay in the dtype of their file and
only adapters are trained: state, optimiser and checkpoints hold adapters and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ches_jax.errors import ChesError
from ches_jax.inputs import ModelFiles, Opener
from ches_jax.models.adapters.lora import (
    ALL_LINEAR,
    Spec,
    adapted,
    adapter_shapes,
    initial_adapters,
    make_spec,
    merged,
)
from ches_jax.models.adapters.packed import is_packed, with_packed
from ches_jax.models.adapters.peft import (
    Adapter,
    read_adapter,
    write_adapter,
)
from ches_jax.models.checkpoint.load import load_model, with_parameters
from ches_jax.models.checkpoint.save import save_pretrained
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.models.layers import Linear
from ches_jax.models.sharding import placement
from ches_jax.runs.store import remove
from ches_jax.train.config import LoraOptions
from ches_jax.train.token_masks import without_masks

MODEL = "model"
ADAPTER = "adapter"


@dataclass(frozen=True)
class Lora:
    """The adapters a run trains."""

    spec: Spec
    start: Adapter | None = None
    """Where they start, if not from B = 0."""


def require_lora_options(config: LoraOptions) -> None:
    """Refuse options of adapters that do not go together.

    Raises:
      ChesError: names the option.
    """
    if config.adapter is not None and config.lora_rank is not None:
        raise ChesError("--adapter and --lora-rank: an adapter brings its own rank and scale; give one of them")
    options = {"alpha": config.lora_alpha, "targets": config.lora_targets, "rslora": config.lora_rslora or None}
    for name, value in options.items():
        if value is not None and config.lora_rank is None:
            raise ChesError(f"--lora-{name}: belongs to --lora-rank, which is not given")


def open_lora(config: LoraOptions, model: ModelFiles, opener: Opener) -> Lora | None:
    """What the config says about adapters; None in full training.

    Raises:
      ChesError: targets that the model does not have, an adapter that does not fit.
    """
    if config.adapter is not None:
        start = read_adapter(opener.adapter(config.adapter), model.directory)
        return Lora(start.spec, start)
    if config.lora_rank is None:
        return None
    alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    targets = ALL_LINEAR if config.lora_targets is None else config.lora_targets
    return Lora(make_spec(config.lora_rank, alpha, targets, model.decoder, rslora=config.lora_rslora))


@dataclass(frozen=True)
class Policy:
    """A decoder without arrays, and the parameters that no update changes."""

    abstract: Decoder
    spec: Spec = field(default_factory=dict)
    frozen: dict[str, jax.Array] = field(default_factory=dict)
    """By dotted name; empty in full training."""

    def parameters(self, trained: dict[str, Any]) -> dict[str, Any]:
        """All parameters."""
        return {**self.frozen, **trained}

    def with_parameters(self, parameters: dict[str, Any]) -> Decoder:
        """The decoder with all its arrays."""
        return with_parameters(self.abstract, parameters)


def marked_trained(abstract: Decoder, *, adapters: bool) -> Decoder:
    """The decoder with its matrices marked as trained: every one, or those with an adapter beside them."""
    for _, module in nnx.iter_modules(abstract):
        if isinstance(module, Linear):
            module.trained = not adapters or module.lora_a is not None
    return abstract


def make_policy(
    loaded: dict[str, jax.Array],
    decoder: DecoderConfig,
    lora: Lora | None,
    *,
    dtype: str,
    master: str,
    seed: int,
    mesh: Any,
    packed: Mapping[str, str] | None = None,
) -> tuple[Policy, dict[str, jax.Array]]:
    """The policy and the parameters it trains, as they start.

    Args:
      loaded: weights of the base model on the mesh.
      decoder: the architecture.
      lora: adapters, or None to train every weight.
      dtype: dtype of the computation.
      master: dtype of trained parameters.
      seed: of the adapters' start.
      mesh: where they lie.
      packed: modules of the frozen base whose weights stay in their quantised bytes (``adapters.packed``).
    """
    abstract = abstract_decoder(decoder, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(master))
    if lora is None:
        return Policy(marked_trained(abstract, adapters=False)), loaded
    abstract = marked_trained(adapted(abstract, lora.spec, master), adapters=True)
    shapes = adapter_shapes(abstract)
    arrays = initial_adapters(shapes, [seed, 4]) if lora.start is None else lora.start.arrays
    place = placement(mesh)
    trained = {
        name: jax.device_put(arrays[name].astype(leaf.dtype), place(name, leaf.shape)) for name, leaf in shapes.items()
    }
    return Policy(with_packed(abstract, packed or {}, loaded), lora.spec, loaded), trained


def export_adapter(policy: Policy, trained: dict[str, Any], out: Path, base: Path, name: str) -> str:
    """The adapters in PEFT's format, in place of what a run that was stopped has left; returns their fingerprint."""
    remove(out)
    return write_adapter(out, jax.device_get(without_masks(trained)), policy.spec, base, name)


def export_model(policy: Policy, trained: dict[str, Any], out: Path, base: Path, *, whole: bool = False) -> str:
    """The whole model, adapters merged, as a Hugging Face directory, in place of what a stopped run has left.

    ``whole`` writes all of a multimodal base, with the trained model inside. Returns its fingerprint.
    """
    remove(out)
    frozen = policy.frozen
    if any(is_packed(name) for name in frozen):  # merging needs the numbers
        frozen = named_parameters(load_model(base))
    every = merged({**frozen, **without_masks(trained)}, policy.spec)
    plain = abstract_decoder(policy.abstract.config, dtype=policy.abstract.dtype)
    return save_pretrained(with_parameters(plain, every), out, like=base, whole=whole)
