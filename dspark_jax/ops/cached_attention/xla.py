"""`cached_attention` in plain XLA: the flat rows are padded to W per request around the attention alone."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.cached_attention.rows import Rows
from dspark_jax.ops.cached_attention.stack import of_layer
from dspark_jax.ops.sinks import shares

_MASKED = -1e30  # finite: a row without anything to see stays free of NaN


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
    """See `api.cached_attention`. Scores [B, N, W, C] at once."""
    _, n, h = query.shape
    key, value = of_layer(key, value, layer)
    b, k, c, _ = key.shape
    w, groups = rows.most, n // k
    padded = rows.pad(query)  # [B, W, N, H]
    own = jnp.arange(w) < rows.counts[:, None]
    ends = rows.positions + rows.counts
    last = rows.positions[:, None] + jnp.arange(w) if causal else jnp.broadcast_to(ends[:, None] - 1, (b, w))
    row = jnp.arange(c)
    last = last[..., None]
    if front:
        row, ring = row - front, c - 2 * front + 1
        visible = ((last - row) % ring < jnp.minimum(window, last + 1)) & (row >= 0) & (row < ring)
    else:
        visible = (row <= last) & (row > last - window) if window else row <= last
    visible &= own[..., None]  # [B, W, C]
    if not finite:
        # A weight of exactly 0 times NaN is NaN. Masked scores are replaced whatever they are, so keys may stay.
        value = jnp.where(jnp.any(visible, axis=1)[:, None, :, None], value, 0)
    # One product per key head over its whole group of query rows: the layout that CPU matmuls take uncopied.
    grouped = padded.reshape(b, w, k, groups, h).transpose(0, 2, 3, 1, 4).reshape(b, k, groups * w, h)
    scores = jnp.einsum("bkrh,bkch->bkrc", grouped, key, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(visible[:, None, None], scores.reshape(b, k, groups, w, c), _MASKED)
    sinks = None if sinks is None else sinks.reshape(k, groups, 1)
    weights = shares(scores, sinks).astype(value.dtype).reshape(b, k, groups * w, c)
    mixed = (weights @ value).reshape(b, k, groups, w, h).transpose(0, 3, 1, 2, 4).reshape(b, w, n, h)
    return jnp.where(rows.real[:, None, None], rows.flatten(mixed), 0).astype(query.dtype)
