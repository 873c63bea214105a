"""`attention` as a Pallas kernel for NVIDIA GPUs, for what cuDNN does not take: rows with limits of their own (a prompt
read piece by piece), sinks, heads of 512, float32. No array of scores, and keys that nobody sees are not read.

For one key head, the queries of all positions are one list of T*R rows (R query heads read a key head): row t*R + r.

    forward   grid (K, row tiles, B)    out

A gradient, which a frozen target does not need, is that of `xla.attention`. Never run on a GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax.ops import triton
from dspark_jax.ops.attention.kernels import Case, attend
from dspark_jax.ops.sights import sights
from dspark_jax.ops.triton import LOG2E, MASKED, dot, load, numbers, rows_of, store
from dspark_jax.ops.triton_attention import Tile, add_scores, nothing_seen, runs, sees, tile_of_keys, walk


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
    tile: Tile | None = None,
) -> jax.Array:
    """See `api.attention`. Over a mesh, devices split the sequences and the key heads. `tile` is for tests."""
    h = query.shape[-1]
    triton.check(
        the_head_width_is_no_power_of_two_from_16_to_512=h in triton.HEAD_WIDTHS,
        the_arrays_are_of_different_types=query.dtype == key.dtype == value.dtype,
    )
    tile = tile or Tile.forward(h * query.dtype.itemsize)
    return attend(Case(query, key, value, limit, starts, scale, window, sinks), functools.partial(_here, tile=tile))


class _Shape(NamedTuple):
    """Letters of the api on one device; R = N / K."""

    t: int
    n: int
    s: int
    r: int


def _here(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    limit: jax.Array,
    first: jax.Array,
    sinks: jax.Array | None,
    *,
    scale: float,
    tile: Tile,
) -> jax.Array:
    """The heads [B, T, K, R, H] on one device; sinks are [K, R]."""
    b, t, k, r, h = query.shape
    shape = _Shape(t, k * r, key.shape[1], r)
    count = pl.cdiv(t * r, tile.rows)
    row = jnp.minimum(jnp.arange(count * tile.rows), t * r - 1).reshape(count, tile.rows) // r
    table = runs(*sights(limit[:, row], first[:, row], tile.keys, pl.cdiv(shape.s, tile.keys)))
    rows = query.reshape(b, t * k * r, h)
    whole = pl.BlockSpec((None, t * k * r, h), lambda k, i, b: (b, 0, 0))
    context = pl.BlockSpec((None, shape.s, None, h), lambda k, i, b: (b, 0, k, 0))
    numbers_of = pl.BlockSpec((None, t), lambda k, i, b: (b, 0))
    borders = pl.BlockSpec((None, count, 4), lambda k, i, b: (b, 0, 0))
    own = pl.BlockSpec((None, r), lambda k, i, b: (k, 0))
    out = triton.call(
        functools.partial(_kernel, shape=shape, tile=tile, factor=scale * LOG2E),
        [rows, key, value, limit, first, table, *([] if sinks is None else [sinks.astype(jnp.float32)])],
        [whole, context, context, numbers_of, numbers_of, borders, *([] if sinks is None else [own])],
        jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        whole,
        grid=(k, count, b),
        warps=tile.warps,
        stages=tile.stages,
    )
    return out.reshape(query.shape)


def _kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, limit_ref: Any, first_ref: Any, runs_ref: Any, *rest: Any,
    shape: _Shape, tile: Tile, factor: float,
) -> None:  # fmt: skip
    """References: query and out [T*N, H] of all heads; keys and values [S, H]; limit and first [T]; sinks [R]."""
    *sinks_ref, out_ref = rest
    head, number = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1)  # the longest tiles first
    row = numbers(tile.rows, number * tile.rows)
    there = row < shape.t * shape.r
    position = lax.div(row, shape.r)
    group = row - position * shape.r
    place = rows_of(q_ref, position * shape.n + head * shape.r + group)
    q = load(q_ref, place, there[:, None], 0.0)
    limit, first = load(limit_ref, position, there), load(first_ref, position, there)

    top, total, out = nothing_seen(tile.rows, q_ref.shape[1])
    if sinks_ref:
        top = load(sinks_ref[0], group, there, 0.0) * LOG2E
        total = jnp.ones_like(total)

    def body(masked: bool) -> Any:
        def step(j: Any, carry: Any) -> Any:
            key_row, key, value = tile_of_keys(j, tile.keys, shape.s, (k_ref, v_ref), masked=masked)
            scores = dot(q, key.T) * factor
            if masked:
                scores = jnp.where(sees(key_row, first[:, None], limit[:, None]), scores, MASKED)
            return add_scores(scores, value, carry)

        return step

    _, total, out = walk(runs_ref, number, body, (top, total, out))
    store(out_ref, place, out / jnp.where(there, total, 1.0)[:, None], there[:, None])
