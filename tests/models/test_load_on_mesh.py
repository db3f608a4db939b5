"""A model loaded on a mesh that a user made gives the logits of one device, or says in words what the mesh lacks."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import ChesError
from ches_jax.models import load_model

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...], Any]] = {
    "one axis": ((4,), ("fsdp",), None),
    "another order": ((2, 2), ("tensor", "data"), None),
    "another name": ((4,), ("model",), {"tensor": "model"}),
    "two axes for one part": (
        (2, 2, 2),
        ("replica", "shard", "model"),
        {"fsdp": ["replica", "shard"], "tensor": "model"},
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 1291, (4, 13)).astype(np.int32)


def user_mesh(kind: str, axis_type: AxisType) -> tuple[Any, Any]:
    sizes, names, axes = MESHES[kind]
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names)), axes


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> np.ndarray:
    """The logits of one device."""
    return np.asarray(jax.jit(lambda m, t: m(t))(load_model(tiny_model), TOKENS))


def same(logits: Any, alone: np.ndarray) -> None:
    np.testing.assert_allclose(logits, alone, atol=2e-5 * np.abs(alone).max())


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
@pytest.mark.parametrize("kind", MESHES)
def test_any_mesh_gives_the_logits_of_one_device(tiny_model: Path, alone: np.ndarray, kind: str, axis_type: AxisType):
    mesh, axes = user_mesh(kind, axis_type)
    model = load_model(tiny_model, mesh=mesh, axes=axes)
    call = nnx.jit(lambda m, t: m(t))
    same(call(model, TOKENS), alone)
    with jax.set_mesh(mesh):  # tokens that lie on the mesh, in its context
        same(call(model, jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))), alone)
    assert len(model.layers.self_attn.q_proj.weight[...].sharding.device_set) == mesh.size


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_rows_that_do_not_divide_and_padding(tiny_model: Path, alone: np.ndarray, axis_type: AxisType):
    mesh, axes = user_mesh("one axis", axis_type)
    model = load_model(tiny_model, mesh=mesh, axes=axes)
    padded = np.pad(TOKENS[:3], ((0, 0), (2, 0)))
    mask = np.pad(np.ones_like(TOKENS[:3], bool), ((0, 0), (2, 0)))
    same(jax.jit(lambda m, t, mask: m(t, mask=mask))(model, padded, mask)[:, 2:], alone[:3])


def test_gradients_on_explicit_axes_are_those_of_one_device(tiny_model: Path):
    mesh, axes = user_mesh("another order", EXPLICIT)

    def loss(model: Any, tokens: Any) -> Any:
        return jnp.square(model(tokens)).mean()

    def gradients(**options: Any) -> dict[str, np.ndarray]:
        actual = nnx.jit(nnx.grad(loss))(load_model(tiny_model, **options), TOKENS)
        return {str(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(actual)}

    here, there = gradients(), gradients(mesh=mesh, axes=axes)
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, atol=2e-5 * np.abs(value).max(), err_msg=name)


def test_called_without_a_mesh_states_and_logits_are_the_parts_of_a_call(tiny_model: Path, alone: np.ndarray):
    model = load_model(tiny_model, dtype=jnp.float32)
    same(model(TOKENS[:1].tolist()), alone[:1])
    same(model.logits(model.hidden(TOKENS[:1])), alone[:1])


AXES = "data, fsdp, tensor, expert"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mesh": ((4,), ("model",))}, f"mesh axis 'model' .size 4. is none of {AXES}; .*axes={{'fsdp': 'model'}}"),
        ({"mesh": ((4,), ("model",)), "axes": {"tp": "model"}}, f"axes has 'tp'; expected {AXES}"),
        ({"mesh": ((4,), ("fsdp",)), "axes": {"fsdp": "shards"}}, "axes names 'shards', which the mesh does not have"),
        ({"mesh": ((4,), ("x",)), "axes": {"fsdp": "x", "tensor": "x"}}, "mesh axis 'x' is given two parts"),
        ({"mesh": "model=4"}, "expected axis=size pairs with axes data, fsdp, tensor"),
        ({"axes": {"fsdp": "x"}}, "give mesh= too"),
        ({"dtype": "int8"}, "dtype='int8'; expected one of float64, float32, float16, bfloat16"),
        ({"dtype": "float64"}, "needs jax.config.update"),
    ],
)
def test_what_a_mesh_lacks_is_said_in_words(tiny_model: Path, options: dict[str, Any], problem: str):
    mesh = options.get("mesh")
    if isinstance(mesh, tuple):
        options = options | {"mesh": jax.make_mesh(*mesh, axis_types=(AUTO,))}
    with pytest.raises(ChesError, match=problem):
        load_model(tiny_model, **options)


def test_another_context_mesh_is_said_in_words(tiny_model: Path):
    model = load_model(tiny_model, mesh=make_mesh("fsdp=4"))
    with (
        jax.set_mesh(make_mesh("data=4")),
        pytest.raises(ChesError, match=r"the model lies on the mesh .* the context mesh"),
    ):
        model(TOKENS)


def test_a_mesh_axis_of_size_one_needs_no_part(tiny_model: Path, alone: np.ndarray):
    mesh = jax.make_mesh((4, 1), ("data", "stage"), axis_types=(AUTO, AUTO))
    same(jax.jit(lambda m, t: m(t))(load_model(tiny_model, mesh=mesh), TOKENS), alone)


def test_the_face_imports_jax_only_when_it_is_used():
    code = "import sys, ches_jax.models as m; dir(m); assert 'jax' not in sys.modules and 'load_model' in m.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)
