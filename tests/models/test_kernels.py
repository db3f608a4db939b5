"""Kernels: which one runs where, none trusted unseen, the same states on a mesh; lowered for devices not here."""

from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import ChesError
from ches_jax.models.attention import choose
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.choose import KERNELS, Kernel, Setting, check, choose_attention
from ches_jax.models.attention.dense import AttentionInputs, AttentionParams, dense
from ches_jax.models.attention.mask import KeyRanges
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import decoder_config

from .test_mesh import spread, states
from .test_strict import family

LLAMA = decoder_config(family("llama", head_dim=64, num_attention_heads=2, num_key_value_heads=1))
H100 = Setting("gpu", "H100", 9.0, "bfloat16", 128, 4, False)
V5E = Setting("tpu", "TPU v5 lite", 0.0, "bfloat16", 128, 4, False)


@pytest.mark.parametrize("name", KERNELS)
def test_sliding_windows_and_soft_caps_on_a_mesh_of_heads_and_rows(name: str):
    raw = family(
        "gemma2",
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=40,
        max_position_embeddings=64,
        sliding_window=5,
        attn_logit_softcapping=2.0,
    )
    model = Decoder(decoder_config(raw), rngs=nnx.Rngs(1))
    nnx.update(model, jax.tree.map(lambda w: w * 5 if w.ndim > 1 else w, nnx.state(model)))
    mesh = make_mesh("data=2,tensor=2")
    actual = states(spread(model, mesh), mesh, attend=KERNELS[name].make(True))
    plain = states(model, None, attend=dense)
    np.testing.assert_allclose(actual, plain, atol=1e-5 * np.abs(plain).max())


def test_the_cpu_computes_in_blocks():
    assert choose_attention("auto", LLAMA, "float32").name == "blocks"
    assert choose_attention("dense", LLAMA, "float32").attend is dense


def gradients(attend, inputs: AttentionInputs, params: AttentionParams, cotangent):
    """By queries, keys and values; what padding sees has no weight in the sum."""

    def weighted(q, k, v):
        return jnp.sum(attend(inputs._replace(q=q, k=k, v=v), params) * cotangent)

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2)))(inputs.q, inputs.k, inputs.v)


@pytest.mark.parametrize(("softcap", "group"), [pytest.param(None, 5, marks=pytest.mark.slow), (1.5, 2)])
def test_the_gradient_of_the_tpu_kernel_is_that_of_the_plain_computation(softcap, group):
    """Of packed rows with and without a window, of lengths that divide no block, in float64."""
    ranges = choose._packed_rows()
    rows, length = ranges.own_start.shape
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 4)
        shapes = ((rows, length, 2, group, 8), (rows, length, 2, 8), (rows, length, 2, 8), (rows, length, 2, group, 8))
        q, k, v, cotangent = (jax.random.normal(key, s, jnp.float64) for key, s in zip(keys, shapes, strict=True))
        inputs, params = AttentionInputs(q, k, v, ranges), AttentionParams(0.7, softcap)
        expected, by_hand = gradients(dense, inputs, params, cotangent)
        actual, by_kernel = gradients(KERNELS["pallas-tpu"].make(True), inputs, params, cotangent)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    for ours, theirs in zip(by_kernel, by_hand, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13 * np.abs(theirs).max() * length)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_agree_in_bfloat16_when_interpreted(name: str):
    assert check(KERNELS[name].make(True), LLAMA, "bfloat16") is None


@pytest.mark.parametrize(
    ("name", "setting", "reason"),
    [
        ("pallas-tpu", V5E, None),
        ("pallas-tpu", H100, "needs a TPU"),
        ("pallas-tpu", V5E._replace(dtype="float16"), "not float16"),
        ("pallas-tpu", V5E._replace(group=64), "this model has 64"),
        ("pallas-gpu", H100, None),
        ("pallas-gpu", H100._replace(dtype="float32", head_dim=80, group=1), None),
        ("pallas-gpu", V5E, "8.0 or more"),
        ("pallas-gpu", H100._replace(capability=7.5), "8.0 or more"),
        ("pallas-gpu", H100._replace(dtype="float64"), "not float64"),
        ("pallas-gpu", H100._replace(head_dim=512), "have 512"),
    ],
)
def test_why_a_kernel_cannot_run(name: str, setting: Setting, reason: str | None):
    why = KERNELS[name].why_not(setting)
    assert why is None if reason is None else why is not None and reason in why


def test_a_kernel_that_cannot_run_here_says_why_and_what_can():
    with pytest.raises(ChesError, match=r"pallas-gpu: cannot run on this cpu: it needs an NVIDIA.*blocks, dense"):
        choose_attention("pallas-gpu", LLAMA, "float32")
    with pytest.raises(ChesError, match="expected auto, pallas-tpu, pallas-gpu, blocks, dense"):
        choose_attention("flash", LLAMA, "float32")


def sees_everything_before(inputs: AttentionInputs, params: AttentionParams):
    """A faulty kernel: the chosen response's tokens are visible to the rejected one's."""
    ranges = inputs.ranges._replace(own_start=jnp.zeros_like(inputs.ranges.own_start))
    return dense(inputs._replace(ranges=ranges), params)


def fails(inputs: AttentionInputs, params: AttentionParams):
    raise NotImplementedError("no such instruction")


@pytest.mark.parametrize(
    ("attend", "fault"), [(sees_everything_before, "differs from"), (fails, "no such instruction")]
)
def test_a_faulty_kernel_is_never_used(monkeypatch, attend, fault):
    faulty = Kernel(lambda interpret: attend, lambda setting: None)
    monkeypatch.setattr(choose, "KERNELS", {"faulty": faulty})
    with pytest.raises(ChesError, match=f"--attention faulty: .*{fault}"):
        choose_attention("faulty", LLAMA, "float32")
    chosen = choose_attention("auto", LLAMA, "float32")
    assert (chosen.name, chosen.attend) == ("blocks", blocks)
    assert fault in chosen.rejected[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "platform", "call"), [("pallas-tpu", "tpu", "tpu_custom_call"), ("pallas-gpu", "cuda", "triton")]
)
def test_kernels_lower_for_devices_that_are_not_here(name: str, platform: str, call: str, dtype: str):
    if platform == "cuda" and tuple(map(int, version("jaxlib").split(".")[:3])) > (0, 10, 2):
        pytest.skip("from jaxlib 0.10.3 on lowering for CUDA compiles, which needs the CUDA plugin")
    rows, length, kv, group, head = 2, 2048, 2, 4, 128
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    q, k = shape((rows, length, kv, group, head)), shape((rows, length, kv, head))
    ranges = jax.eval_shape(lambda: KeyRanges(*[jnp.zeros((rows, length), jnp.int32)] * 4))
    run = jax.jit(partial(KERNELS[name].make(False), params=AttentionParams(0.1, 30.0)))
    assert (
        call
        in run.trace(jax.eval_shape(AttentionInputs, q, k, k, ranges)).lower(lowering_platforms=(platform,)).as_text()
    )
