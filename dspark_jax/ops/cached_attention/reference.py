"""The definition of `cached_attention`: every flat row has a cache of its own."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.cached_attention.rows import Rows
from dspark_jax.ops.cached_attention.stack import of_layer


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: Rows,
    *,
    layer: jax.Array | int | None,
    scale: float,
    window: int,
    front: int,
    causal: bool,
    finite: bool,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """See `api.cached_attention`. Holds a copy of the cache for every row, [T, C, N, H]."""
    del finite
    key, value = of_layer(key, value, layer)
    b, k, c, _ = key.shape
    owner = jnp.minimum(rows.owner, b - 1)
    groups = query.shape[1] // k
    last = rows.at if causal else rows.positions[owner] + rows.counts[owner] - 1
    row = jnp.arange(c)
    position = jnp.broadcast_to(row, (rows.at.shape[0], c))
    if front:  # the latest one up to the last that may be in a row of the ring
        ring = c - 2 * front + 1
        position = row - front + (last[:, None] - (row - front)) // ring * ring
        position = jnp.where((row >= front) & (row < front + ring), position, -1)
    seen = (position <= last[:, None]) & (position >= 0) & rows.real[:, None]  # [T, C]
    if window:
        seen &= position > last[:, None] - window
    keys, values = (x[owner].swapaxes(1, 2).repeat(groups, axis=2) for x in (key, value))  # [T, C, N, H]
    scores = jnp.einsum("tnh,tcnh->tcn", query, keys, preferred_element_type=jnp.float32, precision="highest") * scale
    scores = jnp.where(seen[..., None], scores, -1e30)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32), (len(scores), 1, len(sinks)))
        scores = jnp.concatenate([scores, sink], axis=1)
    weights = jax.nn.softmax(scores, axis=1)[:, :c]
    values = jnp.where(seen[..., None, None], values, 0)
    out = jnp.einsum("tcn,tcnh->tnh", weights, values.astype(jnp.float32), precision="highest")
    return jnp.where(rows.real[:, None, None], out, 0).astype(query.dtype)
