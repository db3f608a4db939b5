"""Attention and the products of experts compiled by the TPU's own compiler, which needs no TPU.

For three kinds of chips: every path that attention can take there, in both dtypes, forward and with a gradient.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.choose import KERNELS
from ches_jax.models.attention.dense import Attend, AttentionInputs, AttentionParams, dense, query_chunked
from ches_jax.models.attention.mask import KeyRanges
from ches_jax.models.experts import FEW_ROWS, grouped_matmul
from ches_jax.models.platform import planned_for
from ches_jax.plan.topologies import devices_of, parse_topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU's compiler: pip install 'ches-jax[tpu]'"),
]
HEADS = {
    "Llama-3-8B": (4, 128), "Llama-3-70B": (8, 128), "DeepSeek-V3": (1, 192), "Gemma": (2, 256), "small": (3, 64),
    "most of a head": (32, 128),
}  # fmt: skip
"""Query heads of a key/value head, channels of a head."""
KERNEL = KERNELS["pallas-tpu"].make(False)
PLAIN = {"dense": dense, "query_chunked": query_chunked, "blocks": blocks}
DTYPES = ("bfloat16", "float32")
EXPERTS = {
    "Mixtral-8x7B": (8, 14336, 4096),
    "Qwen3-30B-A3B": (128, 768, 2048),
    "DeepSeek-V3 on expert=8": (32, 2048, 7168),
}
"""Experts of a device, outputs and inputs of a matrix of one."""
ROUTED = 8192
"""Rows of a grouped product: tokens, each as often as it has experts."""


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def device(request):
    return devices_of(parse_topology(request.param))[0]


def compiled(
    device: Any,
    attend: Attend,
    heads: tuple[int, int],
    dtype: str,
    params: AttentionParams,
    kind: str,
    sinks: bool = False,
) -> str:
    """Text of the program for two rows of 1,024 tokens, or for the next token of each."""
    (group, width), rows, length, kv = heads, 2, 1024, 2
    shape = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    queries = 1 if kind == "next token" else length
    q, k = shape((rows, queries, kv, group, width), dtype), shape((rows, length, kv, width), dtype)
    ends: Any = shape((rows, queries), jnp.int32)  # stands for an array
    own = (shape((kv, group), dtype),) if sinks else ()

    def run(q, k, v, ranges, *sinks):
        return attend(AttentionInputs(q, k, v, ranges, *sinks), params)

    def pulled(q, k, v, ranges, *sinks):
        out, back = jax.vjp(lambda q, k, v, *sinks: run(q, k, v, ranges, *sinks), q, k, v, *sinks)
        return back(out)

    def pushed(q, k, v, ranges, *sinks):
        return jax.jvp(lambda q, k, v: run(q, k, v, ranges, *sinks), (q, k, v), (q, k, v))

    program = {"gradient": pulled, "forward mode": pushed}.get(kind, run)
    return text_of(program, q, k, k, KeyRanges(ends, ends, ends, ends), *own)


def text_of(program: Callable[..., Any], *shapes: Any) -> str:
    """Of the program as the TPU's compiler makes it."""
    with planned_for("tpu"):
        text = jax.jit(program).lower(*shapes).compile().as_text()
    assert text is not None
    return text


@pytest.mark.parametrize("kind", ["forward", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_the_kernels_compile(device, heads, dtype, kind):
    text = compiled(device, KERNEL, HEADS[heads], dtype, AttentionParams(0.1, 30.0), kind)
    assert text.count('custom_call_target="tpu_custom_call"') == (3 if kind == "gradient" else 1)


@pytest.mark.parametrize(("path", "kind"), [("dense", "forward"), ("blocks", "forward"), ("query_chunked", "gradient")])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_paths_compile(device, path, kind, dtype, sinks):
    """For what they are chosen there: scores and prompts, training; also of heads with sinks, which no kernel takes."""
    text = compiled(device, PLAIN[path], (4, 128), dtype, AttentionParams(0.1), kind, sinks)
    assert "tpu_custom_call" not in text


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_mode_compiles(device, dtype):
    assert compiled(device, query_chunked, (4, 128), dtype, AttentionParams(0.1), "forward mode")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_next_token_of_a_cache_compiles(device, dtype):
    assert compiled(device, dense, (4, 128), dtype, AttentionParams(0.1), "next token")


@pytest.mark.parametrize("kind", ["forward", "gradient", "forward mode"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_the_grouped_products_of_experts_compile(device, experts, dtype, kind):
    count, outputs, width = EXPERTS[experts]
    shape = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    x, weight = shape((ROUTED, width), dtype), shape((count, outputs, width), dtype)

    def pulled(x, weight, sizes):
        out, back = jax.vjp(lambda x, weight: grouped_matmul(x, weight, sizes), x, weight)
        return back(out)

    def pushed(x, weight, sizes):
        return jax.jvp(lambda x, weight: grouped_matmul(x, weight, sizes), (x, weight), (x, weight))

    program = {"forward": grouped_matmul, "gradient": pulled, "forward mode": pushed}[kind]
    text_of(program, x, weight, shape((count,), jnp.int32))


def test_a_loop_over_tokens_keeps_no_copy_of_the_experts(device):
    """Two layers of DeepSeek-V3's experts for a few rows: the compiler's own grouped product would turn them all."""
    count, _, width = EXPERTS["DeepSeek-V3 on expert=8"]
    shape = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    layers = shape((2, count, width, width), "bfloat16")

    def tokens(x, layers, sizes):
        def one(carry):
            step, x = carry
            return step + 1, jax.lax.scan(lambda x, w: (jnp.tanh(grouped_matmul(x, w, sizes)), None), x, layers)[0]

        return jax.lax.while_loop(lambda carry: carry[0] < sizes[0], one, (jnp.int32(0), x))[1]

    with planned_for("tpu"):
        arguments = shape((FEW_ROWS, width), "bfloat16"), layers, shape((count,), jnp.int32)
        compiled = jax.jit(tokens).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < layers.size * 2 / 4
