"""Every attention path compiled by the TPU's own compiler, which needs no TPU, for three kinds of chips."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.choose import KERNELS
from ches_jax.models.attention.dense import AttentionInputs, AttentionParams, dense, query_chunked
from ches_jax.models.attention.mask import KeyRanges
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


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def device(request):
    return devices_of(parse_topology(request.param))[0]


def compiled(device, attend, heads, dtype, params, gradient) -> str:
    """Text of the program for two rows of 2,048 tokens."""
    (group, width), rows, length, kv = heads, 2, 2048, 2
    shape = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    q, k = shape((rows, length, kv, group, width), dtype), shape((rows, length, kv, width), dtype)
    ends: Any = shape((rows, length), jnp.int32)  # stands for an array
    ranges = KeyRanges(ends, ends, ends, ends)

    def run(q, k, v, ranges):
        return attend(AttentionInputs(q, k, v, ranges), params)

    def pulled(q, k, v, ranges):
        out, back = jax.vjp(lambda q, k, v: run(q, k, v, ranges), q, k, v)
        return back(out)

    with planned_for("tpu"):
        text = jax.jit(pulled if gradient else run).lower(q, k, k, ranges).compile().as_text()
    assert text is not None
    return text


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads", HEADS)
def test_the_kernels_compile(device, heads, dtype, gradient):
    text = compiled(device, KERNEL, HEADS[heads], jnp.dtype(dtype), AttentionParams(0.1, 30.0), gradient)
    assert text.count('custom_call_target="tpu_custom_call"') == (3 if gradient else 1)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("path", PLAIN)
def test_the_other_paths_compile(device, path, gradient):
    text = compiled(device, PLAIN[path], (4, 128), jnp.dtype("bfloat16"), AttentionParams(0.1), gradient)
    assert "tpu_custom_call" not in text
