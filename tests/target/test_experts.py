"""A mixture of experts as a module; what computes it is tested in tests/ops/test_expert_mlp.py."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import MeshConfig
from dspark_jax.sharding import make_mesh
from dspark_jax.target import experts
from dspark_jax.target.families.family import ExpertShape

E, D, F, K = 5, 6, 4, 2


def test_what_is_between_the_matrices():
    """Plain, and as GPT-OSS has it: gates limited from above, values from both sides, by another sigmoid, plus one."""
    gate, up = np.random.default_rng(0).normal(size=(2, 7, F))
    plain, of_gpt_oss = ExpertShape(E, K, F, True), ExpertShape(E, K, F, True, biases=True, limit=0.7, sharpness=1.702)
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(experts._inner(plain, "silu")(jnp.asarray(gate), jnp.asarray(up)), expected, rtol=1e-5)
    gate, up = np.minimum(gate, 0.7), np.clip(up, -0.7, 0.7)
    expected = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    found = experts._inner(of_gpt_oss, "silu")(jnp.asarray(gate), jnp.asarray(up))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_experts_that_a_mesh_does_not_divide_stay_whole():
    """Five of them on four devices: all have all of them, and none is added up twice."""
    arch: Any = SimpleNamespace(hidden_size=D)
    mixture = experts.Experts(arch, ExpertShape(E, K, F, True), stack=(), scale=0.5, rngs=nnx.Rngs(0))
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, D)), jnp.float32)
    expected = mixture(rows)
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 4), jax.devices())):
        found = jax.jit(mixture)(rows)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
