"""The gated delta rule: all implementations against each other, and against its definition for what a row may do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops.delta_rule import OPERATION, delta_rule

B, K, R, H, W = 2, 2, 3, 8, 5


def inputs(rows, *, alike=False) -> Any:
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, B, rows, K, H)).astype(np.float32)
    if alike:  # a text that repeats one token: the hardest system
        key[:] = key[:, :1]
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value = rng.normal(size=(B, rows, K, R, W)).astype(np.float32)
    decay = -rng.exponential(0.05 if not alike else 1e-3, (B, rows, K, R)).astype(np.float32)
    rate = rng.uniform(0.9 if alike else 0, 1, (B, rows, K, R)).astype(np.float32)
    return query, key, value, decay, rate, rng.normal(size=(B, K, R, H, W)).astype(np.float32)


def run(name, arrays, **settings):
    return jax.jit(lambda *x: delta_rule(*x, **settings, implementation=name))(*arrays)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("name", [name for name in OPERATION.names if name != "reference"])
@pytest.mark.parametrize("rows", [1, 7, 64, 65, 150])
def test_chunks_are_the_definition(name, rows):
    assert_same(run(name, inputs(rows)), run("reference", inputs(rows)))
    assert_same(run(name, inputs(rows, alike=True)), run("reference", inputs(rows, alike=True)))


@pytest.mark.parametrize("name", OPERATION.names)
def test_packed_documents_are_separate_ones(name):
    """Borders within a chunk, on its edge, and two in one chunk; the first document goes on from the state."""
    arrays, bounds = inputs(150), [0, 20, 64, 130, 137, 150]
    starts = np.repeat([-3, *bounds[1:-1]], np.diff(bounds))
    out, state = run(name, arrays, starts=jnp.stack([starts, starts]))
    last = arrays[-1]
    for first, end in zip(bounds, bounds[1:], strict=False):
        own = [x[:, first:end] for x in arrays[:-1]]
        expected, last = run("reference", [*own, arrays[-1] if first == 0 else np.zeros_like(arrays[-1])])
        assert_same((out[:, first:end],), (expected,))
    assert_same((state,), (last,))


@pytest.mark.parametrize("name", OPERATION.names)
def test_the_state_after_some_rows_knows_nothing_of_the_others(name):
    arrays = inputs(12)
    out, state = run(name, arrays, kept=5)
    assert_same((out,), run("reference", arrays)[:1])
    assert_same((state,), run("reference", [*(x[:, :5] for x in arrays[:-1]), arrays[-1]])[1:])
    others = [np.concatenate([x[:, :5], 3 * x[:, 5:]], axis=1) for x in arrays[:3]]
    np.testing.assert_array_equal(run(name, [*others, *arrays[3:]], kept=5)[1], state)


@pytest.mark.parametrize("name", OPERATION.names)
def test_rows_of_rate_and_decay_0_change_nothing(name):
    query, key, value, decay, rate, state = inputs(9)
    real = np.arange(9)[:, None, None] < 6
    masked = query, key, value, np.where(real, decay, 0), np.where(real, rate, 0), state
    expected = run("reference", [x[:, :6] for x in (query, key, value, decay, rate)] + [state])[1]
    np.testing.assert_allclose(run(name, masked)[1], expected, rtol=0, atol=1e-5)
    still = query, key, value, 0 * decay, 0 * rate, state
    np.testing.assert_array_equal(run(name, still)[1], state)


def test_shapes_that_do_not_fit_are_refused():
    query, key, value, decay, rate, state = inputs(3)
    with pytest.raises(ValueError, match="do not fit key"):
        delta_rule(query, key, value, decay, rate[:, :2], state)
    with pytest.raises(ValueError, match="starts"):
        delta_rule(query, key, value, decay, rate, state, starts=jnp.zeros((B, 2), jnp.int32))
    with pytest.raises(ValueError, match="kept=4"):
        delta_rule(query, key, value, decay, rate, state, kept=4)
