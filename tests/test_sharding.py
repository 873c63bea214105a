import jax
import jax.numpy as jnp
import pytest

from dspark_jax.config import InputError, MeshConfig
from dspark_jax.sharding import RULES, Param, constrain, gather, make_mesh, spec, state_shardings


def test_mesh_sizes():
    assert make_mesh(MeshConfig()).shape == {"data": 1, "fsdp": 8, "tensor": 1}
    assert make_mesh(MeshConfig(2, -1, 2)).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(InputError, match=r"needs 6 devices, 8 are here"):
        make_mesh(MeshConfig(3, 2, 1))
    with pytest.raises(InputError, match=r"needs 6 devices, 8 are here"):
        make_mesh(MeshConfig(3, -1, 1))


def test_logical_axes_become_mesh_axes():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert spec(("batch", None), (4, 3), mesh) == jax.P(("data", "fsdp"), None)
    assert spec(("embed", "mlp"), (4, 6), mesh) == jax.P("fsdp", "tensor")
    # what a mesh axis does not divide stays whole
    assert spec(("embed", "mlp"), (5, 6), mesh) == jax.P(None, "tensor")
    with pytest.raises(KeyError):
        spec(("no_such_axis",), (4,), mesh)
    with pytest.raises(ValueError, match="twice"):
        spec(("heads", "mlp"), (4, 4), mesh)
    assert spec(tuple(RULES)[:1], (8,), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])) == jax.P(None)


def test_experts_are_held_whole_where_there_are_enough():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    axes = ("experts", "embed", "expert_width")
    assert spec(axes, (8, 12, 3), mesh) == jax.P(("tensor", "fsdp"), None, None)
    assert spec(axes, (6, 12, 3), mesh) == jax.P("tensor", "fsdp", None)
    assert spec(axes, (5, 12, 3), mesh) == jax.P(None, "fsdp", None)
    assert spec(axes, (8, 12, 3), make_mesh(MeshConfig(1, 8, 1))) == jax.P("fsdp", None, None)
    with jax.set_mesh(mesh):
        for sizes in ((8, 12, 3), (6, 12, 3)):
            collected = jax.jit(lambda x: gather(x, *axes))(jnp.zeros(sizes))
            assert tuple(collected.sharding.spec) in (("tensor",), ("tensor", None, None))


def test_parameters_are_laid_out_by_their_axes():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    tree = {"w": Param(jnp.zeros((4, 6)), axes=("embed", "mlp")), "step": jnp.zeros(())}
    shardings = state_shardings(tree, mesh)
    assert shardings["w"].get_value().spec == jax.P("fsdp", "tensor")
    assert shardings["step"].spec == jax.P()


def test_constrain_pins_under_a_mesh_and_is_free_without():
    x = jnp.zeros((8, 4))
    assert constrain(x, "batch", None) is x
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x * 2, "batch", None))(x)
    assert y.sharding.spec == jax.P(("data", "fsdp"), None) or y.sharding.spec == jax.P(("data", "fsdp"))
