"""What the TPU kernels of attention over many rows share: tiles of rows and of keys, and an online softmax.

Scores are held transposed, [keys, rows], so that everything that belongs to a row (its limit, maximum, sum) lies along
the lanes, and no reduction crosses them. Queries of all heads that read one key head are the rows of a tile, head by
head. A table in scalar memory says what a tile of rows sees of a tile of keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax.ops.mosaic import MASKED, dot, numbers
from dspark_jax.ops.sights import sights

ROWS = 1024
"""Rows of a tile that are aimed at."""

KEYS = 512
"""And keys."""

SCORES = ROWS * KEYS
"""The largest tile of scores: 2 MB, and four are alive at once."""

ROW_BYTES = 512
"""Of a head; wider ones have smaller tiles: 16 MB on the chip are what a kernel may take on a v5e."""

TABLE = 1 << 15
"""Entries of a table of tiles in scalar memory."""

_SKIP, _MASK, _WHOLE = 0, 1, 2  # what a tile of rows sees of a tile of keys: nothing, a part, everything


def sights_of_tiles(limit: jax.Array, first: jax.Array, keys: int, count: int) -> jax.Array:
    """What the rows of each tile see of each of `count` tiles, as numbers for `in_sight`; arguments as in `sights`."""
    active, full = sights(limit, first, keys, count)
    return jnp.where(active, jnp.where(full, _WHOLE, _MASK), _SKIP).astype(jnp.int32)


def turn_tables(seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sights, tile to hold at each turn), both flat: a tile that is skipped holds the next one already, or the last.

    Holding the same tile for several turns is one transfer. The last axis of `seen` is that of the turns.
    """
    count = seen.shape[-1]
    number = jnp.arange(count)
    later = lax.cummin(jnp.where(seen > _SKIP, number, count), axis=seen.ndim - 1, reverse=True)
    last = jnp.max(jnp.where(seen > _SKIP, number, 0), -1, keepdims=True)
    return seen.reshape(-1), jnp.where(later < count, later, last).astype(jnp.int32).reshape(-1)


def in_sight(sight: Any, body: Any, visible: Any) -> None:
    """`body(mask)` with None or a mask, or nothing at all."""
    pl.when(sight == _WHOLE)(lambda: body(None))
    pl.when(sight == _MASK)(lambda: body(visible()))


def visible(begin: Any, limit_ref: Any, first_ref: Any, keys: int) -> jax.Array:
    """[keys, rows]: which rows, of [1, rows] limits and firsts, see which of the keys from `begin` on."""
    row = numbers((keys, limit_ref.shape[1]), 0) + begin
    return (row >= first_ref[...]) & (row < limit_ref[...])


def scores_of(
    key: jax.Array, query: jax.Array, mask: jax.Array | None, scale: float, *, across: bool = False
) -> jax.Array:
    """[keys, rows] of keys [keys, H] and rows [rows, H], or [H, rows] if they lie across."""
    found = dot(key, query, transposed=not across) * scale
    return found if mask is None else jnp.where(mask, found, MASKED)


def begin_softmax(found: jax.Array, value: jax.Array, sum_ref: Any, top_ref: Any, total_ref: Any) -> None:
    """The first scores [keys, rows] of rows, of which every row has a real one; values are transposed, [H, keys]."""
    top_ref[...] = top = jnp.max(found, axis=0, keepdims=True)
    weights = jnp.exp(found - top)
    total_ref[...] = jnp.sum(weights, axis=0, keepdims=True)
    sum_ref[...] = dot(value, weights.astype(value.dtype))


def add_softmax(found: jax.Array, value: jax.Array, sum_ref: Any, top_ref: Any, total_ref: Any) -> None:
    """More of them. A row that has seen nothing yet counts what is masked; its first real score takes that back."""
    before = top_ref[...]
    top_ref[...] = top = jnp.maximum(before, jnp.max(found, axis=0, keepdims=True))
    weights, shrink = jnp.exp(found - top), jnp.exp(before - top)
    total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
    sum_ref[...] = sum_ref[...] * shrink + dot(value, weights.astype(value.dtype))


def rows_of(ref: Any) -> jax.Array:
    """The rows [R*m, H] of a tile [R, m, H]."""
    return ref[...].reshape(-1, ref.shape[2])


def put_rows(ref: Any, across: jax.Array) -> None:
    """Writes the rows of a tile, given transposed, [H, R*m]."""
    ref[...] = across.T.reshape(ref.shape).astype(ref.dtype)


def padded(x: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    """x with `axis` filled up to a multiple."""
    pad = [(0, -x.shape[axis] % multiple if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pad, constant_values=value)
