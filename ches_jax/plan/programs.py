"""The programs of the verbs on shapes alone: nothing is allocated, and they compile for devices that are not there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.data.packing import empty_batch
from ches_jax.distributed.mesh import row_sharding, row_shards, weights_are_whole
from ches_jax.generate.engine import Decoding, decoding_programs
from ches_jax.generate.packing import Prompts, Stream
from ches_jax.generate.sampling import WORDS, Sampling
from ches_jax.models.adapters.lora import adapted, adapter_shapes, make_spec
from ches_jax.models.attention.dense import Attend
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, abstract_decoder, abstract_parameters, packs_prompts
from ches_jax.models.sharding import partition_spec
from ches_jax.plan.config import PlanConfig
from ches_jax.scores.forward import Outputs, pass_program
from ches_jax.train.data.batches import Batch
from ches_jax.train.objective import get_objective, initial_loss_state
from ches_jax.train.optimizer import make_optimizer, make_schedule
from ches_jax.train.policy import marked_trained
from ches_jax.train.state import abstract_state, state_shardings
from ches_jax.train.step import Step

PAIRS_A_ROW = 2


@dataclass(frozen=True)
class Program:
    """Something to lower, and what of its memory is what."""

    lower: Callable[[], Any]
    parts: Mapping[str, int]
    """Bytes a device of its arguments, by what they are, also of those that the program does not read."""
    times: float
    """How often it runs in one step."""


def bytes_on_a_device(tree: Any) -> int:
    """Of arrays with shardings: what one device holds."""
    return sum(
        int(np.prod(a.sharding.shard_shape(a.shape), dtype=np.int64)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def _placed(name: str, leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec() if weights_are_whole(mesh) else partition_spec(name, leaf.shape, mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def _state(model: Decoder, mesh: Mesh) -> tuple[Any, Any]:
    """Graph and abstract state of a decoder on a mesh."""
    graph, state = nnx.split(model)

    def placed(path: Any, leaf: Any) -> Any:
        value = leaf.get_value() if hasattr(leaf, "get_value") else leaf
        return leaf.replace(_placed(".".join(map(str, path)), value, mesh))

    return graph, nnx.from_flat_state([(path, placed(path, leaf)) for path, leaf in nnx.to_flat_state(state)])


def _on_rows(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=row_sharding(mesh)), tree)


def score(decoder: DecoderConfig, config: PlanConfig, mesh: Mesh, attend: Attend) -> list[Program]:
    """The pass of ``ches score`` over a batch."""
    model = abstract_decoder(decoder, param_dtype=jnp.dtype(config.dtype), dtype=jnp.dtype(config.dtype))
    graph, state = _state(model, mesh)
    rows = _on_rows(empty_batch(config.rows * row_shards(mesh), config.row_tokens, None), mesh)
    run = pass_program(graph, mesh, Outputs(logps=config.logps), attend)
    parts = {"weights": bytes_on_a_device(state), "batch": bytes_on_a_device(rows)}
    return [Program(lambda: run.lower(state, None, rows), parts, 1)]


def generate(decoder: DecoderConfig, config: PlanConfig, mesh: Mesh) -> list[Program]:
    """Prefill and loop of ``ches generate`` for a batch."""
    model = abstract_decoder(decoder, param_dtype=jnp.dtype(config.dtype), dtype=jnp.dtype(config.dtype))
    graph, state = _state(model, mesh)
    count = config.rows * row_shards(mesh)
    stream, prompts = (_on_rows(a, mesh) for a in _generation_shapes(count, config.prompt_tokens))
    whole = weights_are_whole(mesh)
    packed = whole and packs_prompts(decoder)
    decoding = Decoding(graph, Sampling(), config.new_tokens, (), None if whole else mesh, False, packed)
    prefill, decode = decoding_programs(decoding, mesh)
    parts = {"weights": bytes_on_a_device(state), "batch": bytes_on_a_device((stream, prompts))}

    def loop() -> Any:
        lowered = prefill.lower(state, stream, prompts)
        cache = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            lowered.out_info, lowered.compile().output_shardings,
        )  # fmt: skip
        one = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
        return decode.lower(state, None, prompts, cache, one, one)

    return [Program(lambda: prefill.lower(state, stream, prompts), parts, 1), Program(loop, parts, config.new_tokens)]


def _generation_shapes(rows: int, length: int) -> tuple[Stream, Prompts]:
    """A batch of prompts of one length, each in a row of its own."""
    of_tokens, of_rows = jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    keys = jax.ShapeDtypeStruct((rows, WORDS), jnp.uint32)
    return Stream(of_tokens, of_tokens, of_tokens), Prompts(of_tokens, of_rows, of_rows, keys)


def train(decoder: DecoderConfig, config: PlanConfig, mesh: Mesh) -> list[Program]:
    """One update of ``ches train``: gradient and optimiser in one program, float32 master weights."""
    dtype = jnp.dtype(config.dtype)
    loss = get_objective(config.loss, {})
    optimizer = make_optimizer(config.optimizer, make_schedule("constant", 1e-6, 1))
    if config.lora_rank is None:
        abstract = abstract_decoder(decoder, dtype=dtype, param_dtype=jnp.float32)
        abstract = marked_trained(abstract, adapters=False)
        params, frozen = abstract_parameters(decoder, dtype=dtype, param_dtype=jnp.float32), {}
    else:
        spec = make_spec(config.lora_rank, 2.0 * config.lora_rank, "all-linear", decoder)
        abstract = adapted(abstract_decoder(decoder, dtype=dtype, param_dtype=dtype), spec, "float32")
        abstract = marked_trained(abstract, adapters=True)
        params = adapter_shapes(abstract)
        base = abstract_parameters(decoder, dtype=dtype, param_dtype=dtype)
        frozen = {name: _placed(name, leaf, mesh) for name, leaf in base.items()}
    example = abstract_state(params, optimizer, initial_loss_state(loss, jnp.float32))
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), example, state_shardings(example, mesh)
    )
    count = config.rows * row_shards(mesh)
    pairs = PAIRS_A_ROW * count
    everywhere = NamedSharding(mesh, PartitionSpec())

    def of(shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=everywhere)

    batch = Batch(
        _on_rows(empty_batch(count, config.row_tokens, None), mesh),
        of((pairs,), jnp.int32), of((pairs,), jnp.int32), of((pairs, 2), jnp.int32), of((pairs, 2), jnp.float32), {},
    )  # fmt: skip
    step = Step(abstract, optimizer, loss, example, mesh, frozen=None, remat=config.remat)
    parts = {
        "weights": bytes_on_a_device((state.params, frozen)), "optimiser": bytes_on_a_device(state.opt_state),
        "batch": bytes_on_a_device(batch),
    }  # fmt: skip
    return [Program(lambda: step.lower(state, frozen, batch), parts, 1)]
