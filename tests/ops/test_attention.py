"""Attention against a float64 loop over single rows, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops.attention import attention, cudnn, xla
from dspark_jax.ops.dispatch import Unsupported

IMPLEMENTATIONS = {
    "xla": attention,
    "reference": functools.partial(attention, implementation="reference"),
    "chunks of four rows": lambda q, k, v, *, scale, window=0, limit=None, starts=None, sinks=None: xla.attention(
        q, k, v, limit, starts, scale=scale, window=window, sinks=sinks, chunk=4
    ),
}


def problem(t=11, s=11, n=6, k=2, h=4, seed=3):
    rng = np.random.default_rng(seed)
    shapes = ((2, t, n, h), (2, s, k, h), (2, s, k, h))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes], rng


def loop(query, key, value, limit, first, scale, sinks=None):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    repeat = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(query.shape[:3]):
        seen = slice(first[b, t], limit[b, t])
        scores = key[b, seen, n // repeat] @ query[b, t, n] * scale
        weights, sink = np.exp(scores), 0 if sinks is None else np.exp(sinks[n])
        out[b, t, n] = weights @ value[b, seen, n // repeat] / (weights.sum() + sink)
    return out


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [0, 1, 4])
def test_equals_loops(run, window):
    """Causal rows, rows with limits of their own, and rows of documents."""
    arrays, rng = problem()
    rows = np.broadcast_to(np.arange(11), (2, 11))
    documents = np.stack([np.repeat([0, 5], [5, 6]), np.repeat([0, 1, 10], [1, 9, 1])])
    own = rng.integers(1, 12, (2, 11))
    cases = ((None, None), (own, None), (None, documents), (own, np.minimum(documents, own - 1)))
    for limit, starts in cases:
        given = {name: jnp.asarray(x) for name, x in (("limit", limit), ("starts", starts)) if x is not None}
        got = jax.jit(functools.partial(run, scale=0.5, window=window))(*arrays, **given)
        limit = rows + 1 if limit is None else limit
        first = np.maximum(limit - window if window else 0, 0 if starts is None else starts)
        want = loop(*arrays, limit, np.broadcast_to(first, limit.shape), 0.5)
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_sinks_take_their_share_and_give_nothing(run):
    """Some next to nothing, one far above all scores; of packed documents in a window."""
    arrays, _ = problem()
    sinks, rows = np.array([-80.0, -1.0, 0.0, 0.5, 3.0, 60.0], np.float32), np.broadcast_to(np.arange(11), (2, 11))
    documents = np.stack([np.repeat([0, 5], [5, 6]), np.zeros(11, np.int64)])
    got = run(*arrays, scale=0.5, window=4, starts=jnp.asarray(documents), sinks=jnp.asarray(sinks))
    want = loop(*arrays, rows + 1, np.maximum(rows - 3, documents), 0.5, sinks.astype(np.float64))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_more_keys_than_rows_and_bfloat16():
    (query, key, value), rng = problem(t=3, s=17)
    limit = rng.integers(1, 18, (2, 3))
    narrow = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    got = attention(*narrow, scale=0.5, limit=jnp.asarray(limit))
    assert got.dtype == jnp.bfloat16
    want = loop(*(x.astype(jnp.float32) for x in narrow), limit, np.zeros_like(limit), 0.5)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2**-7 * np.abs(want).max())


def test_refusals():
    (query, key, value), _ = problem()
    with pytest.raises(ValueError, match="do not fit"):
        attention(query, key, value[:, 1:], scale=1.0)
    with pytest.raises(ValueError, match="no multiple"):
        attention(query[:, :, :3], key, value, scale=1.0)
    with pytest.raises(ValueError, match="3 rows and 11 keys need a limit"):
        attention(query[:, :3], key, value, scale=1.0)
    with pytest.raises(ValueError, match="starts is"):
        attention(query, key, value, scale=1.0, starts=jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="sinks is"):
        attention(query, key, value, scale=1.0, sinks=jnp.zeros(2))
    with pytest.raises(Unsupported, match="heads have sinks"):
        attention(query, key, value, scale=1.0, sinks=jnp.zeros(6), implementation="cudnn")
    with pytest.raises(Unsupported, match="float32"):
        cudnn.attention(query, key, value, None, None, scale=1.0, window=0)
    with pytest.raises(Unsupported, match="limits of their own"):
        attention(query, key, value, scale=1.0, limit=jnp.ones((2, 11), jnp.int32), implementation="cudnn")
