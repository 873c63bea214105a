"""The forms in which a mixture of experts is computed, against its definition in NumPy."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import MeshConfig
from dspark_jax.sharding import make_mesh
from dspark_jax.target import experts
from dspark_jax.target.families.family import ExpertShape

E, D, F, K = 5, 6, 4, 2


SHAPES = {
    "plain": ExpertShape(E, K, F, True),
    "clipped": ExpertShape(E, K, F, True, biases=True, limit=0.7, sharpness=1.702),
}


def between(shape, gate, up):
    """What is between an expert's matrices."""
    if shape.sharpness is None:
        return gate / (1 + np.exp(-gate)) * up
    gate, up = np.minimum(gate, shape.limit), np.clip(up, -shape.limit, shape.limit)
    return (up + 1) * gate / (1 + np.exp(-shape.sharpness * gate))


@pytest.mark.parametrize("t", [1, 23])
@pytest.mark.parametrize("form", ["_collected", "_blocks", "_ragged"])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_form_is_the_definition(kind, form, t, monkeypatch):
    """Some experts have no rows, one has more than a block."""
    shape = SHAPES[kind]
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(t, D)), rng.uniform(size=(t, K))
    gate, up, down = (rng.normal(size=sizes) for sizes in ((E, D, F), (E, D, F), (E, F, D)))
    biases = [rng.normal(size=(E, n)) * shape.biases for n in (F, F, D)]
    chosen = np.stack([np.full(t, 3), np.arange(t) % 2], axis=-1)  # 2 and 4 have none
    expected = np.zeros((t, D))
    for row, pair, shares in zip(range(t), chosen, weights, strict=True):
        for e, share in zip(pair, shares, strict=True):
            inner = between(shape, rows[row] @ gate[e] + biases[0][e], rows[row] @ up[e] + biases[1][e])
            expected[row] += share * (inner @ down[e] + biases[2][e])
    monkeypatch.setattr(experts.platform, "current", lambda: "tpu" if form == "_ragged" else "cpu")
    monkeypatch.setattr(experts, "_BLOCK", 8)
    monkeypatch.setattr(experts, "_few", lambda pairs, count: form == "_collected")
    given = (rows, weights, gate, up, down, *(biases if shape.biases else ()))
    x, shares, *parts = (jnp.asarray(value, jnp.float32) for value in given)
    seen = []
    for name in ("_collected", "_blocks", "_ragged"):
        of = getattr(experts, name)
        monkeypatch.setattr(experts, name, lambda *given, of=of, name=name: seen.append(name) or of(*given))
    inner = experts._inner(shape, "silu")
    run = jax.jit(lambda: experts._own_part(x, jnp.asarray(chosen), shares, *parts, count=E, inner=inner))
    (found,) = run()
    assert seen == [form]
    np.testing.assert_allclose(found[0], expected, rtol=2e-5, atol=2e-5)


def test_experts_that_a_mesh_does_not_divide_stay_whole():
    """Five of them on four devices: all have all of them, and none is added up twice."""
    arch: Any = SimpleNamespace(hidden_size=D)
    mixture = experts.Experts(arch, ExpertShape(E, K, F, True), stack=(), scale=0.5, rngs=nnx.Rngs(0))
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, D)), jnp.float32)
    expected = mixture(rows)
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 4), jax.devices())):
        found = jax.jit(mixture)(rows)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
