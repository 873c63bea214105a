"""Attention of the rows of a pass to a window of rows and to compressed rows, in one softmax, which has a sink."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dspark_jax.ops.sinks import shares
from dspark_jax.target.families.family import CompressedShape, IndexShape

_BLOCK = 128
"""Queries of a request that are attended with at a time."""


class Own(NamedTuple):
    """What the rows of a pass give.

    Attributes:
      query: [B, S, N, H] turned.
      row: [B, S, H] turned key, and value.
      raw: [B, S, 2, s, H] what compressed rows are made of; None: there are none.
      index_query: [B, S, I, W] turned queries of the index; None: there is none.
      index_weigh: [B, S, I] weights of its heads.
      index_raw: [B, S, 2, s, W].
    """

    query: jax.Array
    row: jax.Array
    raw: jax.Array | None = None
    index_query: jax.Array | None = None
    index_weigh: jax.Array | None = None
    index_raw: jax.Array | None = None


class Made(NamedTuple):
    """Compressed rows of a request.

    Attributes:
      ends: [B, C] the last row of each, as queries' places count rows; beyond all places where there is none.
      rows: [B, C, H].
      index_rows: [B, C, W], where there is an index.
    """

    ends: jax.Array
    rows: jax.Array
    index_rows: jax.Array | None = None


def attended(
    own: Own,
    keys: jax.Array,
    first: jax.Array,
    low: jax.Array,
    made: Made | None,
    sinks: jax.Array,
    shape: CompressedShape,
) -> jax.Array:
    """Heads [B, S, N, H] of queries at the places first[b] + 0..S-1, block after block.

    Args:
      own: the pass's rows.
      keys: [B, window - 1 + S, H] those before it, and its own.
      first: [B].
      low: [B, S] the first place that each may see.
      made: compressed rows, if there are any.
      sinks: [N].
      shape: of the attention.
    """
    size, past = own.query.shape[1], shape.window - 1
    run = functools.partial(_block, made=made, sinks=sinks, shape=shape)
    asks = _Asking(own.query, first[:, None] + jnp.arange(size), low, own.index_query, own.index_weigh)
    if size <= _BLOCK:
        return run(asks, keys)
    room = -size % _BLOCK
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, room), *((0, 0),) * (x.ndim - 2)), mode="edge"), asks)
    keys = jnp.pad(keys, ((0, 0), (0, room), (0, 0)))

    def step(at: jax.Array) -> jax.Array:
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, _BLOCK, axis=1), padded)
        return run(part, jax.lax.dynamic_slice_in_dim(keys, at, _BLOCK + past, axis=1))

    blocks = jax.lax.map(step, jnp.arange(0, size + room, _BLOCK))  # [blocks, B, _BLOCK, N, H]
    return jnp.moveaxis(blocks, 0, 1).reshape(len(first), -1, *own.query.shape[2:])[:, :size]


class _Asking(NamedTuple):
    """Queries [B, Q, N, H], their places [B, Q], the first places that they may see; and what the index asks."""

    query: jax.Array
    at: jax.Array
    low: jax.Array
    index_query: jax.Array | None
    index_weigh: jax.Array | None


def _block(asks: _Asking, keys: jax.Array, *, made: Made | None, sinks: jax.Array, shape: CompressedShape) -> jax.Array:
    """Heads [B, Q, N, H] of Q queries that follow one another, and keys [B, window - 1 + Q, H] from before them on."""
    place = asks.at[:, :1] - (shape.window - 1) + jnp.arange(keys.shape[1])
    at, low = asks.at[..., None], asks.low[..., None]
    near = (place[:, None] <= at) & (place[:, None] > at - shape.window) & (place[:, None] >= low)
    parts = [("bqnh,bkh->bqnk", "bqnk,bkh->bqnh", keys, near)]
    if made is not None:
        seen = (made.ends[:, None] <= at) & (made.ends[:, None] >= low)
        parts.append(("bqnh,bkh->bqnk", "bqnk,bkh->bqnh", made.rows, seen))
        if shape.index is not None and made.rows.shape[1] > shape.index.chosen:
            chosen, seen = _chosen(asks, made, seen, shape.index)
            rows = jax.vmap(lambda rows, chosen: rows[chosen])(made.rows, chosen)
            parts[1] = ("bqnh,bqkh->bqnk", "bqnk,bqkh->bqnh", rows, seen)
    scale = shape.width**-0.5
    scores = [
        jnp.where(
            seen[:, :, None],
            scale * jnp.einsum(form, asks.query, rows.astype(asks.query.dtype), preferred_element_type=jnp.float32),
            -jnp.inf,
        )
        for form, _, rows, seen in parts
    ]
    weights = shares(jnp.concatenate(scores, axis=-1), sinks).astype(asks.query.dtype)
    out, done = jnp.zeros(()), 0
    for (_, form, rows, _), score in zip(parts, scores, strict=True):
        share = weights[..., done : done + score.shape[-1]]
        out = out + jnp.einsum(form, share, rows.astype(share.dtype), preferred_element_type=jnp.float32)
        done += score.shape[-1]
    return out.astype(asks.query.dtype)


def _chosen(asks: _Asking, made: Made, seen: jax.Array, index: IndexShape) -> tuple[jax.Array, jax.Array]:
    """Numbers [B, Q, k] of the compressed rows that the index gives the highest scores, and whether each is seen."""
    assert asks.index_query is not None and asks.index_weigh is not None and made.index_rows is not None
    rows = made.index_rows.astype(asks.index_query.dtype)
    found = jnp.einsum("bqih,bch->bqic", asks.index_query, rows, preferred_element_type=jnp.float32)
    weigh = asks.index_weigh.astype(jnp.float32) * (index.heads**-0.5 * index.width**-0.5)
    scores = jnp.einsum("bqic,bqi->bqc", jax.nn.relu(found), weigh)
    chosen = jax.lax.top_k(jnp.where(seen, scores, -jnp.inf), index.chosen)[1]
    return chosen, jnp.take_along_axis(seen, chosen, axis=-1)
