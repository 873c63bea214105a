"""`block_attention` as Pallas kernels for TPUs: no array of scores, and tiles that nothing sees cost neither time nor
traffic. Compiled for TPUs, and run in interpret mode; never run on a TPU.

The blocks are cut into groups of m. The queries of a group that read one key head are a row tile: row
(r*m + a)*G + g, with R query heads per key head. Scores are held transposed, [keys, rows], so that everything that
belongs to a row (its anchor, maximum, sum) lies along the lanes, and no reduction crosses them.

    forward   grid (B, K, groups, key tiles)    out, and the logarithm of each row's sum
    dq        grid (B, K, groups, key tiles)    dq, and dk and dv of the group's own keys
    dkv       grid (B, K, key tiles, groups)    context's dk and dv

XLA brings the arrays into this order, and puts zeros where they may hold NaN, in one pass over them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dspark_jax.ops import mosaic
from dspark_jax.ops.mosaic import dot, numbers
from dspark_jax.ops.mosaic_attention import (
    KEYS,
    ROW_BYTES,
    ROWS,
    SCORES,
    TABLE,
    add_softmax,
    begin_softmax,
    in_sight,
    padded,
    put_rows,
    rows_of,
    scores_of,
    sights_of_tiles,
    turn_tables,
    visible,
)
from dspark_jax.recompute import dear
from dspark_jax.sharding import per_device, share


class Tiles(NamedTuple):
    """Sizes: blocks of a group, context rows of a key tile."""

    blocks: int
    keys: int

    @classmethod
    def fitting(cls, per_block: int, e: int, a: int, row_bytes: int) -> "Tiles":
        """For blocks of so many rows per key head and E own keys; a group has whole registers of rows if it can."""
        part = pl.cdiv(row_bytes, ROW_BYTES)
        most, keys, largest = ROWS // part, KEYS // part, SCORES // part**2
        counts = [m for m in range(16, max(a, 16) + 16, 16) if m * per_block <= most and m * e <= keys] or [16]
        blocks = max(counts, key=lambda m: (m * per_block % mosaic.LANES == 0, m))
        while keys * blocks * per_block > largest and keys > mosaic.LANES:
            keys //= 2
        return cls(blocks, keys)


class _Shape(NamedTuple):
    """Sizes of a problem on one device: letters of the api; T groups of `rows` rows, J key tiles."""

    b: int
    k: int
    t: int
    j: int
    r: int
    g: int
    e: int
    blocks: int
    keys: int
    h: int

    @property
    def rows(self) -> int:
        """Rows of a group."""
        return self.r * self.blocks * self.g

    @property
    def own(self) -> int:
        """Own keys of a group."""
        return self.blocks * self.e


def block_attention(
    query: jax.Array,
    context_key: jax.Array,
    context_value: jax.Array,
    block_key: jax.Array,
    block_value: jax.Array,
    anchors: jax.Array,
    keep: jax.Array,
    starts: jax.Array,
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> jax.Array:
    """See `api.block_attention`. Over a mesh, devices split the sequences and the key heads."""
    (b, a, g, n, h), (s, k), e = query.shape, context_key.shape[1:3], block_key.shape[2]
    if tiles is None and (more := _parts(n // k, g, h * query.dtype.itemsize)) > 1:
        # Each part of a key head's query heads gets a copy of it; the gradient of copying adds the parts up.
        context_key, context_value = (jnp.repeat(x, more, axis=2) for x in (context_key, context_value))
        block_key, block_value = (jnp.repeat(x, more, axis=3) for x in (block_key, block_value))
        k *= more
    rows = g * n // k
    tiles = tiles or Tiles.fitting(rows, e, a, h * query.dtype.itemsize)
    mosaic.check(
        the_head_width_is_no_multiple_of_16_up_to_512=h % 16 == 0 and h <= 512,
        the_type_is_neither_bfloat16_nor_float32=query.dtype in (jnp.bfloat16, jnp.float32),
        the_arrays_are_of_different_types=len({x.dtype for x in (query, context_key, context_value, block_key)}) == 1,
        a_block_has_too_many_rows_or_keys=tiles.blocks * max(rows * tiles.keys, rows * e) <= SCORES,
        there_are_too_many_tiles=share("batch", b) * pl.cdiv(a, tiles.blocks) * pl.cdiv(s, tiles.keys) <= TABLE,
    )
    limit = jnp.where(keep, anchors, -1).astype(jnp.int32)  # -1: the block is nobody's
    grouped = query.reshape(b, a, g, k, n // k, h)
    arrays = (grouped, context_key, context_value, block_key, block_value, limit, jnp.asarray(starts, jnp.int32))
    out: Any = _attention(*arrays, scale, tiles)
    return out.reshape(query.shape)


def _parts(heads: int, g: int, row_bytes: int) -> int:
    """Into how many parts the R query heads of a key head are cut, so that a group of the fewest blocks fits."""
    most = SCORES // pl.cdiv(row_bytes, ROW_BYTES) ** 2 // (mosaic.LANES * 16)  # rows of a block
    return next((parts for parts in range(1, heads) if heads % parts == 0 and heads // parts * g <= most), heads)


_CONTEXT, _BLOCKS = ("batch", None, "kv_heads", None), ("batch", None, None, "kv_heads", None)
_QUERY, _ANCHORS = ("batch", None, None, "kv_heads", None, None), ("batch", None)
_LOG_SUM = ("batch", "kv_heads", None, None, None)
_INPUTS = (_QUERY, _CONTEXT, _CONTEXT, _BLOCKS, _BLOCKS, _ANCHORS, _ANCHORS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(*arguments: Any) -> jax.Array:
    """Arrays as in `_INPUTS`, scale and tiles; query and result are [B, A, G, K, R, H]."""
    return _forward(*arguments)[0]


def _forward(*arguments: Any) -> tuple[jax.Array, Any]:
    arrays, (scale, tiles) = arguments[:7], arguments[7:]
    run = functools.partial(_forward_here, scale=scale, tiles=tiles)
    out, log_sum = map(dear, per_device(run, _INPUTS, (_QUERY, _LOG_SUM))(*arrays))
    return out, (arrays, out, log_sum)


def _backward(scale: float, tiles: Tiles, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    arrays, out, log_sum = kept
    run = functools.partial(_backward_here, scale=scale, tiles=tiles)
    split = per_device(run, (*_INPUTS, _QUERY, _LOG_SUM, _QUERY), _INPUTS[:5])
    return *split(*arrays, out, log_sum, d_out), None, None


_attention.defvjp(_forward, _backward)


# The order in which the kernels take the arrays.


def _grouped(x: jax.Array, kept: jax.Array, shape: _Shape) -> jax.Array:
    """Rows or own keys [B, A, .., heads, H] -> [B, T, heads, those of a group, H]; zeros where a block is not kept."""
    x = padded(jnp.where(kept[..., None, None, None], x, 0), 1, shape.blocks)
    return x.reshape(shape.b, shape.t, -1, *x.shape[3:]).swapaxes(2, 3)


def _ungrouped(x: jax.Array, like: jax.Array) -> jax.Array:
    """Takes back `_grouped`, of an array like that."""
    b, a, g = like.shape[:3]
    return x.swapaxes(2, 3).reshape(b, -1, g, *like.shape[3:])[:, :a]


def _along_lanes(x: jax.Array, shape: _Shape, value: int) -> jax.Array:
    """Numbers of blocks [B, A] -> of rows [B, T, 1, rows]."""
    rows = jnp.repeat(padded(x, 1, shape.blocks, value), shape.g, axis=1).reshape(shape.b, shape.t, 1, -1)
    return jnp.tile(rows, shape.r)


class _Views(NamedTuple):
    """Inputs in the kernels' order: query [B, T, N, m*G, H], context [B, K, J*keys, H], own keys [B, T, K, m*E, H], the
    rest [B, T, 1, rows]."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    own_key: jax.Array
    own_value: jax.Array
    limit: jax.Array
    first: jax.Array


def _views(arrays: Sequence[jax.Array], tiles: Tiles) -> tuple[_Shape, _Views]:
    query, key, value, own_key, own_value, limit, first = arrays
    b, a, g, k, r, h = query.shape
    s, e = key.shape[1], own_key.shape[2]
    t, j = pl.cdiv(a, tiles.blocks), pl.cdiv(s, tiles.keys)
    shape = _Shape(b, k, t, j, r, g, e, tiles.blocks, tiles.keys, h)
    seen = (jnp.arange(s) < jnp.max(limit, axis=1, keepdims=True))[..., None, None]
    context = [padded(jnp.where(seen, x, 0).swapaxes(1, 2), 2, tiles.keys) for x in (key, value)]
    blocks = [_grouped(x, limit >= 0, shape) for x in (query.reshape(b, a, g, k * r, h), own_key, own_value)]
    lanes = _along_lanes(limit, shape, -1), _along_lanes(first, shape, 0)
    return shape, _Views(blocks[0], context[0], context[1], blocks[1], blocks[2], *lanes)


def _transposed(x: jax.Array) -> jax.Array:
    return x.swapaxes(-1, -2)


# Which tiles see which.


def _sights(views: _Views, shape: _Shape) -> jax.Array:
    """What the kept blocks of each group see of each key tile, [B, T, J]."""
    return sights_of_tiles(views.limit[:, :, 0], views.first[:, :, 0], shape.keys, shape.j)


class _Specs(NamedTuple):
    """Blocks of the arrays on a grid (B, K, outer, turns).

    Attributes:
      rows: of a group, [B, T, N, m*G, H].
      own: own keys, [B, T, K, m*E, H].
      own_across: the same transposed.
      lanes: numbers of rows that all heads share, [B, T, 1, rows].
      head_lanes: numbers of rows, [B, T, K, 1, rows].
      keys: [B, K, J*keys, H].
      keys_across: the same transposed.
    """

    rows: pl.BlockSpec
    own: pl.BlockSpec
    own_across: pl.BlockSpec
    lanes: pl.BlockSpec
    head_lanes: pl.BlockSpec
    keys: pl.BlockSpec
    keys_across: pl.BlockSpec

    @classmethod
    def of(cls, shape: _Shape, *, groups_turn: bool) -> "_Specs":
        """For a grid that turns over the groups, or over the key tiles."""
        outer, turns = (shape.j, shape.t) if groups_turn else (shape.t, shape.j)

        def places(b: Any, x: Any, turn: Any, held_ref: Any) -> tuple[Any, Any]:
            """(group, key tile) of a turn."""
            held = held_ref[(b * outer + x) * turns + turn]
            return (held, x) if groups_turn else (x, held)

        def of_groups(*sizes: int | None) -> pl.BlockSpec:
            return pl.BlockSpec(
                (None, None, *sizes), lambda b, k, x, turn, _, held: (b, places(b, x, turn, held)[0], k, 0, 0)
            )

        return cls(
            of_groups(shape.r, shape.blocks * shape.g, shape.h),
            of_groups(None, shape.own, shape.h),
            of_groups(None, shape.h, shape.own),
            pl.BlockSpec(
                (None, None, 1, shape.rows), lambda b, k, x, turn, _, held: (b, places(b, x, turn, held)[0], 0, 0)
            ),
            of_groups(None, 1, shape.rows),
            pl.BlockSpec(
                (None, None, shape.keys, shape.h),
                lambda b, k, x, turn, _, held: (b, k, places(b, x, turn, held)[1], 0),
            ),
            pl.BlockSpec(
                (None, None, shape.h, shape.keys),
                lambda b, k, x, turn, _, held: (b, k, 0, places(b, x, turn, held)[1]),
            ),
        )


def _costs(shape: _Shape, products: int) -> dict[str, Any]:
    """What the compiler is told: rows see half of the context, as evenly spread anchors do."""
    pairs = shape.b * shape.k * shape.t * shape.rows * (shape.j * shape.keys // 2 + shape.own)
    return {"flops": 2 * products * pairs * shape.h, "exponentials": pairs}


def _forward_here(*arrays: jax.Array, scale: float, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """(out, log-sums [B, T, K, 1, rows]) on one device."""
    shape, views = _views(arrays, tiles)
    specs = _Specs.of(shape, groups_turn=False)
    inputs = [views.query, views.key, _transposed(views.value), views.own_key, _transposed(views.own_value)]
    log_sum = jax.ShapeDtypeStruct((shape.b, shape.t, shape.k, 1, shape.rows), jnp.float32)
    out, log_sum = mosaic.call(
        functools.partial(_forward_kernel, shape=shape, scale=scale),
        turn_tables(_sights(views, shape)),
        [*inputs, views.limit, views.first],
        [specs.rows, specs.keys, specs.keys_across, specs.own, specs.own_across, specs.lanes, specs.lanes],
        [jax.ShapeDtypeStruct(views.query.shape, views.query.dtype), log_sum],
        [specs.rows, specs.head_lanes],
        grid=(shape.b, shape.k, shape.t, shape.j),
        parallel=3,
        scratch=[pltpu.VMEM((size, shape.rows), jnp.float32) for size in (shape.h, 1, 1)],
        **_costs(shape, 2),
    )
    query = arrays[0]
    out = _ungrouped(out, query.reshape(*query.shape[:3], -1, shape.h))
    return jnp.where((arrays[5] >= 0)[..., None, None, None], out, 0).reshape(query.shape), log_sum


def _backward_here(*arrays: jax.Array, scale: float, tiles: Tiles) -> tuple[jax.Array, ...]:
    """Gradients of the five arrays on one device."""
    shape, views = _views(arrays[:7], tiles)
    out, log_sum, d_out = arrays[7:]
    kept = arrays[5] >= 0
    b, a, g, k, r, h = arrays[0].shape
    out, d_out = (x.reshape(b, a, g, k * r, h) for x in (out, d_out))
    delta = jnp.where(kept[..., None, None], jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1), 0)
    delta = _grouped(delta[..., None], kept, shape).reshape(log_sum.shape)
    rows = views.query, _grouped(d_out, kept, shape)
    dq, *d_own = _row_gradients(shape, views, rows, log_sum, delta, scale)
    dk, dv = _context_gradients(shape, views, rows, log_sum, delta, scale)
    s = arrays[1].shape[1]
    d_context = [x[:, :, :s].swapaxes(1, 2) for x in (dk, dv)]
    dq = _ungrouped(dq, d_out).reshape(arrays[0].shape)
    return dq, *d_context, *(_ungrouped(x, arrays[3]) for x in d_own)


def _row_gradients(
    shape: _Shape, views: _Views, rows: tuple[jax.Array, jax.Array], log_sum: jax.Array, delta: jax.Array, scale: float
) -> Any:
    """dq, and dk and dv of the own keys, in the kernels' order."""
    specs = _Specs.of(shape, groups_turn=False)
    own = jax.ShapeDtypeStruct(views.own_key.shape, views.query.dtype)
    return mosaic.call(
        functools.partial(_dq_kernel, shape=shape, scale=scale),
        turn_tables(_sights(views, shape)),
        [*rows, views.key, _transposed(views.key), views.value, views.own_key, _transposed(views.own_key)]
        + [views.own_value, views.limit, views.first, log_sum, delta],
        [specs.rows, specs.rows, specs.keys, specs.keys_across, specs.keys, specs.own, specs.own_across]
        + [specs.own, specs.lanes, specs.lanes, specs.head_lanes, specs.head_lanes],
        [jax.ShapeDtypeStruct(views.query.shape, views.query.dtype), own, own],
        [specs.rows, specs.own, specs.own],
        grid=(shape.b, shape.k, shape.t, shape.j),
        parallel=3,
        scratch=[pltpu.VMEM((shape.h, shape.rows), jnp.float32)],
        **_costs(shape, 3),
    )


def _context_gradients(
    shape: _Shape, views: _Views, rows: tuple[jax.Array, jax.Array], log_sum: jax.Array, delta: jax.Array, scale: float
) -> Any:
    """dk and dv of the context, in the kernels' order."""
    specs = _Specs.of(shape, groups_turn=True)
    context = jax.ShapeDtypeStruct(views.key.shape, views.key.dtype)
    return mosaic.call(
        functools.partial(_dkv_kernel, shape=shape, scale=scale),
        turn_tables(_sights(views, shape).swapaxes(1, 2)),
        [*rows, views.key, views.value, views.limit, views.first, log_sum, delta],
        [specs.rows, specs.rows, specs.keys, specs.keys, specs.lanes, specs.lanes, specs.head_lanes, specs.head_lanes],
        [context, context],
        [specs.keys, specs.keys],
        grid=(shape.b, shape.k, shape.j, shape.t),
        parallel=3,
        scratch=[pltpu.VMEM((shape.keys, shape.h), jnp.float32)] * 2,
        **_costs(shape, 4),
    )


# Kernels. References: query, d_out and their like [R, m*G, H]; keys and values [keys, H] and transposed; limit, first,
# log-sum and delta [1, rows]; the tables are in scalar memory.


def _same_block(shape: _Shape) -> jax.Array:
    """[own keys, rows] of a group."""
    size = (shape.own, shape.rows)
    row = lax.rem(numbers(size, 1), shape.blocks * shape.g)
    return lax.div(numbers(size, 0), shape.e) == lax.div(row, shape.g)


def _forward_kernel(
    sights_ref: Any, _: Any, q_ref: Any, k_ref: Any, v_ref: Any, own_k_ref: Any, own_v_ref: Any, limit_ref: Any,
    first_ref: Any, out_ref: Any, log_sum_ref: Any, sum_ref: Any, top_ref: Any, total_ref: Any,
    *, shape: _Shape, scale: float,
) -> None:  # fmt: skip
    b, t, turn = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    q, state = rows_of(q_ref), (sum_ref, top_ref, total_ref)

    @pl.when(turn == 0)
    def _() -> None:  # the own block comes first: after it every row has a real maximum
        begin_softmax(scores_of(own_k_ref[...], q, _same_block(shape), scale), own_v_ref[...], *state)

    def add(mask: jax.Array | None) -> None:
        add_softmax(scores_of(k_ref[...], q, mask, scale), v_ref[...], *state)

    sight = sights_ref[(b * shape.t + t) * shape.j + turn]
    in_sight(sight, add, lambda: visible(turn * shape.keys, limit_ref, first_ref, shape.keys))

    @pl.when(turn == shape.j - 1)
    def _() -> None:
        put_rows(out_ref, sum_ref[...] / total_ref[...])
        log_sum_ref[...] = top_ref[...] + jnp.log(total_ref[...])


def _slopes(
    q: jax.Array, d_out: jax.Array, key: jax.Array, value: jax.Array, log_sum: jax.Array, delta: jax.Array,
    mask: jax.Array | None, scale: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(weights, slope of the scores) [keys, rows] of some keys."""
    weights = jnp.exp(dot(key, q, transposed=True) * scale - log_sum)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    slope = weights * (dot(value, d_out, transposed=True) - delta) * scale
    return weights.astype(q.dtype), slope.astype(q.dtype)


def _dq_kernel(
    sights_ref: Any, _: Any, q_ref: Any, d_out_ref: Any, k_ref: Any, k_across_ref: Any, v_ref: Any, own_k_ref: Any,
    own_k_across_ref: Any, own_v_ref: Any, limit_ref: Any, first_ref: Any, log_sum_ref: Any, delta_ref: Any,
    dq_ref: Any, d_own_k_ref: Any, d_own_v_ref: Any, sum_ref: Any, *, shape: _Shape, scale: float,
) -> None:  # fmt: skip
    b, t, turn = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    q, d_out = rows_of(q_ref), rows_of(d_out_ref)
    row = log_sum_ref[...], delta_ref[...]

    @pl.when(turn == 0)
    def _() -> None:
        weights, slope = _slopes(q, d_out, own_k_ref[...], own_v_ref[...], *row, _same_block(shape), scale)
        d_own_k_ref[...] = dot(slope, q).astype(d_own_k_ref.dtype)
        d_own_v_ref[...] = dot(weights, d_out).astype(d_own_v_ref.dtype)
        sum_ref[...] = dot(own_k_across_ref[...], slope)

    def add(mask: jax.Array | None) -> None:
        _, slope = _slopes(q, d_out, k_ref[...], v_ref[...], *row, mask, scale)
        sum_ref[...] += dot(k_across_ref[...], slope)

    sight = sights_ref[(b * shape.t + t) * shape.j + turn]
    in_sight(sight, add, lambda: visible(turn * shape.keys, limit_ref, first_ref, shape.keys))

    @pl.when(turn == shape.j - 1)
    def _() -> None:
        put_rows(dq_ref, sum_ref[...])


def _dkv_kernel(
    sights_ref: Any, _: Any, q_ref: Any, d_out_ref: Any, k_ref: Any, v_ref: Any, limit_ref: Any, first_ref: Any,
    log_sum_ref: Any, delta_ref: Any, dk_ref: Any, dv_ref: Any, dk_sum_ref: Any, dv_sum_ref: Any,
    *, shape: _Shape, scale: float,
) -> None:  # fmt: skip
    b, j, turn = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(turn == 0)
    def _() -> None:
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def add(mask: jax.Array | None) -> None:
        q, d_out = rows_of(q_ref), rows_of(d_out_ref)
        weights, slope = _slopes(q, d_out, k_ref[...], v_ref[...], log_sum_ref[...], delta_ref[...], mask, scale)
        dk_sum_ref[...] += dot(slope, q)
        dv_sum_ref[...] += dot(weights, d_out)

    sight = sights_ref[(b * shape.j + j) * shape.t + turn]
    in_sight(sight, add, lambda: visible(j * shape.keys, limit_ref, first_ref, shape.keys))

    @pl.when(turn == shape.t - 1)
    def _() -> None:
        dk_ref[...] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)
