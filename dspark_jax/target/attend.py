"""Attention of a layer of a target: over the rows of a pass, and over those that its cache holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.ops.attention import attention
from dspark_jax.ops.cached_attention import Rows, cached_attention
from dspark_jax.target.cache import KVCache
from dspark_jax.target.layers import Attention

FEW_ROWS = 64
"""Rows per request that are attended with as a decoding round's are; more are a prompt's."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """Which rows a pass through a target's layers has; see `Target.forward`."""

    positions: jax.Array
    starts: jax.Array | None = None
    rows: Rows | None = None
    counts: jax.Array | None = None


def attend(
    part: Any, index: jax.Array | int, projections: Attention, normed: jax.Array, run: Pass
) -> tuple[Any, jax.Array]:
    """Heads of the rows of a pass, and the cache with their keys and values.

    Args:
      part: the cache of the layers of this kind, or None.
      index: of the layer among these.
      projections: its attention.
      normed: [B, S, D] what it reads; [1, T, D] of flat rows.
      run: the pass.

    Returns:
      The cache, and heads [B, S, N, H].
    """
    query, key, value, gate = projections.all_gated(normed, run.positions)
    shape, sinks = projections.shape, projections.sinks
    how = {"scale": shape.scale, "window": shape.window, "sinks": None if sinks is None else sinks[...]}
    part, heads = _heads(part, index, how, (query, key, value), run)
    return part, heads if gate is None else heads * jax.nn.sigmoid(gate)


How = dict[str, Any]  # scale, window and sinks of a layer, as `attention` takes them
Own = tuple[jax.Array, jax.Array, jax.Array]  # queries [B, S, N, H], keys and values [B, S, K, H] of a pass


def _heads(part: Any, index: jax.Array | int, how: How, own: Own, run: Pass) -> tuple[Any, jax.Array]:
    """The same before the gates."""
    query, key, value = own
    if part is None:
        return part, attention(query, key, value, starts=run.starts, **how)
    first = run.positions[:, 0]
    if run.rows is not None:
        return _attend_rows(part, index, how, own, run.rows)
    if part.front:
        return _attend_in_ring(part, index, how, own, first, run.counts)
    if query.shape[1] <= FEW_ROWS:
        return _attend_few(part, index, how, own, first)
    part = part.write(index, key, value, first)
    keys, values = part.layer(index)
    return part, attention(query, keys, values, limit=run.positions + 1, **how)


def _attend_rows(part: KVCache, index: jax.Array | int, how: How, own: Own, rows: Rows) -> tuple[KVCache, jax.Array]:
    """Writes the flat rows [1, T, ...] of a pass into layer `index`, and attends with them."""
    query, key, value = (x[0] for x in own)
    part = part.write_rows(index, key, value, rows)
    return part, _attend_cached(part, index, how, query, rows)[None]


def _attend_cached(part: KVCache, index: jax.Array | int, how: How, query: jax.Array, rows: Rows) -> jax.Array:
    """Heads [T, N, H] of flat query rows whose keys and values are in the cache."""
    return cached_attention(query, rows=rows, **part.for_attention(index), **how, front=part.front, finite=True)


def _attend_few(
    part: KVCache, index: jax.Array | int, how: How, own: Own, starts: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Writes S rows of every request into layer `index`, from `starts` [B] on, and attends with them."""
    query, key, value = own
    part = part.write(index, key, value, starts)
    heads = _attend_cached(part, index, how, query.reshape(-1, *query.shape[2:]), Rows.whole(starts, query.shape[1]))
    return part, heads.reshape(query.shape)


def _attend_in_ring(
    part: KVCache, index: jax.Array | int, how: How, own: Own, starts: jax.Array, counts: jax.Array | None
) -> tuple[KVCache, jax.Array]:
    """The same for S rows of every request, from starts [B] on, in a layer with a window, whose cache is a ring.

    A few rows are written first. Many would take the place of rows that the first of them still see, so the window in
    front of them is read before they are written.
    """
    query, key, value = own
    batch, s = query.shape[:2]
    if s <= part.front:
        return _attend_few(part, index, how, own, starts)
    past = how["window"] - 1
    keys, values = (
        jnp.concatenate([old.astype(new.dtype), new], axis=1)
        for old, new in zip(part.before(index, starts, past), (key, value), strict=True)
    )
    limit = jnp.broadcast_to(past + 1 + jnp.arange(s), (batch, s))
    exist = jnp.broadcast_to(jnp.maximum(past - starts, 0)[:, None], limit.shape)  # positions below 0 do not
    heads = attention(query, keys, values, limit=limit, starts=exist, **how)
    counts = jnp.full((batch,), s) if counts is None else counts
    return part.write_last(index, key, value, starts, counts), heads
