"""`attention` as a Pallas kernel for TPUs: no array of scores, and what no row of a tile sees costs nothing.
Compiled for TPUs, and run in interpret mode; never run on a TPU.

The queries of m positions that read one key head are the rows of a tile: row r*m + t, with R query heads per key head.

    forward   grid (B, K, tiles of rows, tiles of keys)    out

XLA brings the arrays into this order. A gradient, which a frozen target does not need, is that of `xla.attention`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dspark_jax.ops import mosaic
from dspark_jax.ops.attention.kernels import Case, attend
from dspark_jax.ops.mosaic import LANES, MASKED
from dspark_jax.ops.mosaic_attention import (
    KEYS,
    ROW_BYTES,
    ROWS,
    SCORES,
    TABLE,
    add_softmax,
    in_sight,
    padded,
    scores_of,
    sights_of_tiles,
    turn_tables,
    visible,
)
from dspark_jax.sharding import share

_MOST_HEADS = 32
"""Query heads of one key head: 128 positions of these, and 128 keys, are the largest tile of scores."""


_ROW_TILE = 13 << 20
"""Bytes of a tile of rows: queries and results twice, since the next ones move meanwhile, and sums in float32."""


class Tiles(NamedTuple):
    """Sizes: positions of a tile of rows, and keys of a tile."""

    positions: int
    keys: int

    @classmethod
    def fitting(cls, heads: int, row_bytes: int) -> "Tiles":
        """For so many query heads per key head; positions fill whole registers."""
        part = pl.cdiv(row_bytes, ROW_BYTES)
        positions = max(ROWS // part // heads // LANES, 1) * LANES
        keys = SCORES // part**2 // (positions * heads) // LANES * LANES
        return cls(positions, min(max(keys, LANES), KEYS // part))


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
    tiles: Tiles | None = None,
) -> jax.Array:
    """See `api.attention`. Over a mesh, devices split the sequences and the key heads.

    `tiles` are for tests; None is what suits the shapes.
    """
    (b, t, n, h), (s, k) = query.shape, key.shape[1:3]
    tiles = tiles or Tiles.fitting(n // k, h * query.dtype.itemsize)
    mosaic.check(
        the_head_width_is_no_multiple_of_16_up_to_512=h % 16 == 0 and h <= 512,
        the_type_is_neither_bfloat16_nor_float32=query.dtype in (jnp.bfloat16, jnp.float32),
        the_arrays_are_of_different_types=query.dtype == key.dtype == value.dtype,
        a_key_head_has_too_many_query_heads=n // k <= _MOST_HEADS,
        a_tile_of_rows_is_too_large=tiles.positions * n // k * h * (4 * query.dtype.itemsize + 4) <= _ROW_TILE,
        there_are_too_many_tiles=share("batch", b) * pl.cdiv(t, tiles.positions) * pl.cdiv(s, tiles.keys) <= TABLE,
    )
    pairs = t * s if limit is not None else _pairs(t, window)
    run = functools.partial(_here, tiles=tiles, pairs=pairs)
    return attend(Case(query, key, value, limit, starts, scale, window, sinks), run)


def _pairs(t: int, window: int) -> int:
    """Pairs of a row and a key that it sees, of a causal sequence of t rows."""
    seen = min(window, t) if window else t
    return seen * (seen + 1) // 2 + (t - seen) * seen


def _here(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    limit: jax.Array,
    first: jax.Array,
    sinks: jax.Array | None,
    *,
    scale: float,
    tiles: Tiles,
    pairs: int,
) -> jax.Array:
    """The heads [B, T, K, R, H] on one device; sinks are [K, R]. `pairs` of rows and keys of a sequence and head are an
    estimate."""
    b, t, k, r, h = query.shape
    m, keys = tiles
    count, j = pl.cdiv(t, m), pl.cdiv(key.shape[1], keys)
    end = [(0, 0), (0, -t % m)]  # rows that fill up the last tile see what the last row sees
    lanes = [jnp.tile(jnp.pad(x, end, mode="edge").reshape(b, count, 1, m), r) for x in (limit, first)]
    rows = padded(query.transpose(0, 2, 3, 4, 1), 4, m)
    context = [padded(x.swapaxes(1, 2), 2, keys) for x in (key, value)]
    lowest = jnp.full((k, r), MASKED) if sinks is None else sinks.astype(jnp.float32)
    lowest = jnp.repeat(lowest, m, axis=1)[:, None]  # [K, 1, R*m]

    def held(b: Any, i: Any, turn: Any, held_ref: Any) -> Any:
        return held_ref[(b * count + i) * j + turn]

    row_spec = pl.BlockSpec((None, None, r, h, m), lambda b, k, i, turn, *_: (b, k, 0, 0, i))
    lane_spec = pl.BlockSpec((None, None, 1, r * m), lambda b, k, i, turn, *_: (b, i, 0, 0))
    out = mosaic.call(
        functools.partial(_kernel, tiles=(count, j, keys), scale=scale, sinks=sinks is not None),
        turn_tables(sights_of_tiles(lanes[0][:, :, 0], lanes[1][:, :, 0], keys, j)),
        [rows, context[0], context[1].swapaxes(2, 3), *lanes, lowest],
        [
            row_spec,
            pl.BlockSpec((None, None, keys, h), lambda b, k, i, turn, _, ref: (b, k, held(b, i, turn, ref), 0)),
            pl.BlockSpec((None, None, h, keys), lambda b, k, i, turn, _, ref: (b, k, 0, held(b, i, turn, ref))),
            lane_spec,
            lane_spec,
            pl.BlockSpec((None, 1, r * m), lambda b, k, i, turn, *_: (k, 0, 0)),
        ],
        jax.ShapeDtypeStruct(rows.shape, query.dtype),
        row_spec,
        grid=(b, k, count, j),
        parallel=3,
        scratch=[pltpu.VMEM((size, r * m), jnp.float32) for size in (h, 1, 1)],
        flops=4 * b * k * r * pairs * h,
        exponentials=b * k * r * pairs,
        moved=2 * rows.nbytes + 2 * b * k * pl.cdiv(pairs, m) * h * key.dtype.itemsize,
    )
    return out[..., :t].transpose(0, 4, 1, 2, 3)


def _kernel(
    sights_ref: Any, _: Any, q_ref: Any, k_ref: Any, v_ref: Any, limit_ref: Any, first_ref: Any, sinks_ref: Any,
    out_ref: Any, sum_ref: Any, top_ref: Any, total_ref: Any,
    *, tiles: tuple[int, int, int], scale: float, sinks: bool,
) -> None:  # fmt: skip
    """References: query and out [R, H, m]; keys [keys, H]; values [H, keys]; limit, first and sinks [1, R*m]."""
    count, j, keys = tiles
    b, i, turn = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    heads, _, m = q_ref.shape

    @pl.when(turn == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = sinks_ref[...]
        total_ref[...] = jnp.full_like(total_ref, 1.0 if sinks else 0.0)

    def add(mask: jax.Array | None) -> None:
        query = jnp.concatenate([q_ref[head] for head in range(heads)], axis=1)
        found = scores_of(k_ref[...], query, mask, scale, across=True)
        add_softmax(found, v_ref[...], sum_ref, top_ref, total_ref)

    sight = sights_ref[(b * count + i) * j + turn]
    in_sight(sight, add, lambda: visible(turn * keys, limit_ref, first_ref, keys))

    @pl.when(turn == j - 1)
    def _() -> None:
        heads_across = sum_ref[...] / total_ref[...]
        for head in range(heads):
            out_ref[head] = heads_across[:, head * m : (head + 1) * m].astype(out_ref.dtype)
