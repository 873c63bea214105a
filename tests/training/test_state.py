"""The training state: the flat view of a module, and creation in shards."""

import jax
import numpy as np
import optax

from dspark_jax.training.state import abstract_drafter, build_drafter, init_state, state_layout, to_module, to_params

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def test_params_and_module_are_each_others_inverse(config):
    drafter = build_drafter(config, jax.random.key(0))
    params = to_params(drafter)
    assert params["backbone.layers.attention.query"].shape == (1, 32, 4, 8)
    doubled = to_module(abstract_drafter(config), {name: 2 * value for name, value in params.items()})
    np.testing.assert_array_equal(doubled.backbone.fc[...], 2 * drafter.backbone.fc[...])
    np.testing.assert_array_equal(doubled.markov.w2[...], 2 * drafter.markov.w2[...])


def test_state_is_the_same_on_every_mesh_and_lies_in_shards(config, meshes):
    one = init_state(config, OPTIMIZER, meshes["one"])
    cube = init_state(config, OPTIMIZER, meshes["cube"])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(cube), strict=True):
        np.testing.assert_array_equal(a, b)
    query = cube.params["backbone.layers.attention.query"]  # [L, embed 32, heads 4, 8]
    assert query.addressable_shards[0].data.shape == (1, 16, 2, 8)
    moments = [leaf for leaf in jax.tree.leaves(cube.optimizer) if leaf.shape == query.shape]
    assert len(moments) >= 2 and all(moment.sharding == query.sharding for moment in moments)
    assert one.step == 0 and one.step.dtype == np.int32


def test_layout_describes_the_state(config, meshes):
    layout = state_layout(abstract_drafter(config), OPTIMIZER, meshes["wide"])
    state = init_state(config, OPTIMIZER, meshes["wide"])
    assert jax.tree.structure(layout) == jax.tree.structure(state)
    for stated, found in zip(jax.tree.leaves(layout), jax.tree.leaves(state), strict=True):
        assert (stated.shape, stated.dtype) == (found.shape, found.dtype)
        assert found.sharding.is_equivalent_to(stated.sharding, found.ndim)


def test_the_seed_decides_the_parameters(config):
    first, second = (build_drafter(config, jax.random.key(seed)).backbone.fc[...] for seed in (0, 1))
    assert not np.array_equal(first, second)
