"""A mixture's experts as an operation: every form against its definition, pair by pair in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.ops.expert_mlp import Parts, expert_mlp, pallas_gpu, pallas_tpu, xla

E, D, F, K = 5, 6, 200, 2
LIMIT, SHARPNESS = 0.7, 1.702


def gated(gate: Any, up: Any, np: Any = jnp) -> Any:
    """Between the matrices of most models."""
    return gate / (1 + np.exp(-gate)) * up


def clipped(gate: Any, up: Any, np: Any = jnp) -> Any:
    """Between those of GPT-OSS, whose value at 0 is not 0."""
    gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
    return (up + 1) * gate / (1 + np.exp(-SHARPNESS * gate))


def problem(t, *, biases=False, layers=0, e=E, seed=0):
    """Rows, experts, weights and parts in float64. Experts 2 and 4 have no rows, 3 has all; -1 and E are elsewhere."""
    rng = np.random.default_rng(seed)
    lead = (layers,) if layers else ()
    shapes = [(*lead, e, D, F), (*lead, e, D, F), (*lead, e, F, D)]
    gate, up, down = (rng.normal(size=shape) * 0.5 for shape in shapes)
    added = [rng.normal(size=(e, n)) for n in (F, F, D)] if biases else [None] * 3
    chosen = np.stack([np.full(t, 3), np.array([0, 1, -1, e])[np.arange(t) % 4]], axis=-1)
    return rng.normal(size=(t, D)), chosen, rng.uniform(size=(t, K)), Parts(gate, up, down, *added)


def definition(rows, chosen, weights, parts, inner, layer=None):
    """What the api says, in NumPy."""
    gate, up, down = (part if layer is None else part[layer] for part in parts[:3])
    biases = [np.zeros((len(gate), n)) if b is None else b for b, n in zip(parts[3:], (F, F, D), strict=True)]
    out = np.zeros_like(rows)
    for t, pair in enumerate(chosen):
        for e, share in zip(pair, weights[t], strict=True):
            if 0 <= e < len(gate):
                between = inner(rows[t] @ gate[e] + biases[0][e], rows[t] @ up[e] + biases[1][e], np)
                out[t] += share * (between @ down[e] + biases[2][e])
    return out


def given(values, dtype=jnp.float32):
    rows, chosen, weights, parts = values
    parts = Parts(*(None if part is None else jnp.asarray(part, dtype) for part in parts))
    return jnp.asarray(rows, dtype), jnp.asarray(chosen, jnp.int32), jnp.asarray(weights, dtype), parts


TPU = functools.partial(pallas_tpu.expert_mlp, count=E, trained=False)
GPU = functools.partial(pallas_gpu.expert_mlp, count=E, trained=False)
IMPLEMENTATIONS = {"xla": functools.partial(expert_mlp, implementation="xla"), "tpu": TPU, "gpu": GPU}


@pytest.mark.parametrize("t", [1, 23])
@pytest.mark.parametrize("form", ["_collected", "_blocks", "_ragged"])
@pytest.mark.parametrize("biases", [False, True])
def test_every_form_of_xla_is_the_definition(biases, form, t, monkeypatch):
    values, inner = problem(t, biases=biases), clipped if biases else gated
    monkeypatch.setattr(xla, "_BLOCK", 8)
    monkeypatch.setattr(xla, "_few", lambda pairs, count: form == "_collected")
    seen = []
    for name in ("_collected", "_blocks", "_ragged"):
        of = getattr(xla, name)
        monkeypatch.setattr(xla, name, lambda *given, of=of, name=name: seen.append(name) or of(*given))
    run = jax.jit(lambda *arrays: expert_mlp(*arrays, inner, trained=form == "_ragged", implementation="xla"))
    found = run(*given(values))
    assert seen == [form]
    np.testing.assert_allclose(found, definition(*values, inner), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("t", [1, 7, 150])
@pytest.mark.parametrize("columns", [128, F])
def test_the_kernel_for_tpus_is_the_definition(t, columns, strict_tpu):
    """One turn of a tile, or two, the last of which ends outside the matrices; of 150 rows, tiles of 32."""
    values = problem(t, biases=True)
    found = jax.jit(lambda *arrays: TPU(*arrays, clipped, layer=None, columns=columns))(*given(values))
    np.testing.assert_allclose(found, definition(*values, clipped), rtol=2e-5, atol=2e-5)
    assert not strict_tpu()


@pytest.mark.parametrize("t", [1, 7, 150])
@pytest.mark.parametrize("biases", [False, True])
def test_the_kernels_for_gpus_are_the_definition(biases, t):
    """Neither the rows' width nor that between the matrices is a multiple of the tiles'."""
    values, inner = problem(t, biases=biases), clipped if biases else gated
    found = jax.jit(lambda *arrays: GPU(*arrays, inner, layer=None))(*given(values))
    np.testing.assert_allclose(found, definition(*values, inner), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_a_stack_one_layer_is_read(implementation):
    values = problem(9, layers=3)
    run = jax.jit(lambda layer, *arrays: IMPLEMENTATIONS[implementation](*arrays, gated, layer=layer))
    for layer in range(3):
        found = run(jnp.int32(layer), *given(values))
        np.testing.assert_allclose(found, definition(*values, gated, layer), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_without_any_row_give_nothing(implementation, strict_tpu):
    """All pairs are another device's."""
    rows, chosen, weights, parts = given(problem(5))
    assert not np.any(IMPLEMENTATIONS[implementation](rows, chosen * 0 - 1, weights, parts, gated, layer=None))


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_in_bfloat16_sums_are_of_float32(kernel):
    """So they are nearer to exact sums of the same numbers than XLA's form, which rounds in between."""
    values = problem(40)
    rounded = given(values, jnp.bfloat16)
    rows, _, weights, parts = jax.tree.map(lambda x: np.asarray(x, np.float64), rounded)
    exact = definition(rows, values[1], weights, parts, gated)
    errors = [
        np.abs(np.asarray(IMPLEMENTATIONS[name](*rounded, gated, layer=None), np.float64) - exact).mean()
        for name in (kernel, "xla")
    ]
    assert errors[0] < 0.01 * np.abs(exact).mean() and errors[0] < errors[1]


def test_a_stack_is_not_taken_apart():
    """Nothing in the program is as large as a layer's matrices."""
    values = given(problem(9, layers=3))
    jaxpr = jax.make_jaxpr(lambda layer, *arrays: TPU(*arrays, gated, layer=layer))(jnp.int32(1), *values)
    assert not [e for e in jaxpr.eqns for v in e.outvars if v.aval.size >= E * D * F]


def test_what_cannot_be_done_is_refused():
    rows, chosen, weights, parts = given(problem(3))
    for kernels in (pallas_tpu, pallas_gpu):
        with pytest.raises(Unsupported, match="no gradients"):
            kernels.expert_mlp(rows, chosen, weights, parts, gated, layer=None, count=E, trained=True)
        with pytest.raises(Unsupported, match="another type"):
            kernels.expert_mlp(
                rows.astype(jnp.bfloat16), chosen, weights, parts, gated, layer=None, count=E, trained=False
            )
    with pytest.raises(ValueError, match=r"up has shape \(5, 200, 6\), it must be \(5, 6, 200\)"):
        expert_mlp(rows, chosen, weights, parts._replace(up=parts.down), gated)
    with pytest.raises(ValueError, match="of a stack"):
        expert_mlp(rows, chosen, weights, parts, gated, layer=0)
