"""`attention` in plain XLA, some query rows at a time."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.sinks import shares

_MASKED = -1e30  # finite, so that the rows that fill up the last chunk stay free of NaN


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    limit: jax.Array | None,
    starts: jax.Array | None,
    *,
    scale: float,
    window: int,
    sinks: jax.Array | None = None,
    chunk: int = 512,
) -> jax.Array:
    """See `api.attention`. Scores never take more than [B, N, chunk, S]."""
    b, t, n, h = query.shape
    limit = jnp.broadcast_to(jnp.arange(t) + 1, (b, t)) if limit is None else limit
    if window:
        first = jnp.maximum(limit - window, 0)
        starts = first if starts is None else jnp.maximum(first, starts)
    if t <= chunk:
        return _attend(query, key, value, limit, starts, scale, sinks)
    pad = -t % chunk

    def split(x: jax.Array, filler: int) -> jax.Array:
        """[B, T, ...] -> [count, B, chunk, ...]."""
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=filler)
        return x.reshape(b, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    parts = split(query, 0), split(limit, 1), None if starts is None else split(starts, 0)
    out = jax.lax.map(lambda part: _attend(part[0], key, value, part[1], part[2], scale, sinks), parts)
    return out.swapaxes(0, 1).reshape(b, t + pad, n, h)[:, :t]


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    limit: jax.Array,
    starts: jax.Array | None,
    scale: float,
    sinks: jax.Array | None,
) -> jax.Array:
    """All rows at once."""
    b, t, n, h = query.shape
    s, k = key.shape[1], key.shape[2]
    # One product per key/value head over its whole group of query rows: the layout that CPU matmuls take uncopied.
    rows = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, n // k * t, h)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("bkrh,bksh->bkrs", rows, key, preferred_element_type=jnp.float32) * scale
    visible = jnp.arange(s) < limit[..., None]  # [B, T, S]
    if starts is not None:
        visible &= jnp.arange(s) >= starts[..., None]
    scores = jnp.where(visible[:, None, None], scores.reshape(b, k, n // k, t, s), _MASKED)
    sinks = None if sinks is None else sinks.reshape(k, n // k, 1)
    weights = shares(scores, sinks).astype(value.dtype).reshape(b, k, n // k * t, s)
    return (weights @ value).reshape(b, k, n // k, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
