"""`block_attention` as Pallas kernels for NVIDIA GPUs: no array of scores, and K and V are read once per key head.

For one key head, the queries of all blocks are one list of A*G*R rows (R query heads read a key head): row
(a*G + g)*R + r. A tile is any successive rows of it. A row tile walks over the key tiles up to its largest anchor with
an online softmax; only those in which an anchor or the start of a document lies need a mask. Own blocks are a small
dense part of each tile.

    forward   grid (K, row tiles, B)    out, and the logarithm of each row's sum (to base 2)
    dq        grid (K, row tiles, B)    dq, and delta = sum(out * d_out) of each row
    dkv       grid (K, key tiles, B)    context's dk and dv; walks over the row tiles that see the key tile
    own       grid (K, groups, B)       dk and dv of the own keys of some blocks

Besides inputs and outputs these take two float32 numbers per row and tables of some KB.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax import platform
from dspark_jax.ops import triton
from dspark_jax.ops.sights import sights
from dspark_jax.ops.triton import LOG2E, MASKED, dot, load, numbers, power_of_two, rows_of, store
from dspark_jax.ops.triton_attention import ROOMY, Tile, add_scores, nothing_seen, runs, sees, tile_of_keys, walk
from dspark_jax.recompute import dear
from dspark_jax.sharding import per_device

_NOBODY = 1e30  # log-sum of rows that are not there: exp2(score - _NOBODY) is 0


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of all kernels. The defaults were the fastest of those tried on an H100 with heads of 128 in bfloat16."""

    forward: Tile = Tile(128, 64, 8, 3)
    dq: Tile = Tile(128, 64, 8, 3)
    dkv: Tile = Tile(64, 128, 8, 2)
    own: Tile = Tile(128, 0, 4, 1)

    @classmethod
    def fitting(cls, row_bytes: int) -> "Tiles":
        """The sizes for heads of so many bytes on this card."""
        forward = Tile.forward(row_bytes)
        if row_bytes <= 256 and platform.gpu_shared_memory() >= ROOMY:
            return cls(forward)
        if row_bytes <= 256:
            return cls(forward, Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 0, 4, 1))
        if row_bytes <= 512 or platform.gpu_shared_memory() >= ROOMY:
            return cls(forward, Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 0, 8, 1))
        return cls(forward, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 0, 8, 1))


class _Shape(NamedTuple):
    """Sizes of a problem on one device: letters of the api; R = N / K."""

    a: int
    g: int
    e: int
    n: int
    k: int
    s: int
    r: int

    @property
    def per_block(self) -> int:
        """Rows of a block."""
        return self.g * self.r

    @property
    def rows(self) -> int:
        """Rows of a key head."""
        return self.a * self.g * self.r


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
    (b, a, g, n, h), k = query.shape, context_key.shape[2]
    triton.check(
        the_head_width_is_no_power_of_two_from_16_to_512=h in triton.HEAD_WIDTHS,
        the_arrays_are_of_different_types=len({x.dtype for x in (query, context_key, context_value, block_key)}) == 1,
    )
    tiles = tiles or Tiles.fitting(h * query.dtype.itemsize)
    limit = jnp.where(keep, anchors, -1).astype(jnp.int32)  # -1: the block is nobody's
    grouped = query.reshape(b, a, g, k, n // k, h)
    arrays = (grouped, context_key, context_value, block_key, block_value, limit, jnp.asarray(starts, jnp.int32))
    out: Any = _attention(*arrays, scale, tiles)
    return out.reshape(query.shape)


_CONTEXT, _BLOCKS = ("batch", None, "kv_heads", None), ("batch", None, None, "kv_heads", None)
_QUERY, _ROWS, _ANCHORS = ("batch", None, None, "kv_heads", None, None), ("batch", "kv_heads", None), ("batch", None)
_INPUTS = (_QUERY, _CONTEXT, _CONTEXT, _BLOCKS, _BLOCKS, _ANCHORS, _ANCHORS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(*arguments: Any) -> jax.Array:
    """Arrays as in `_INPUTS`, scale and tiles; query and result are [B, A, G, K, R, H]."""
    return _forward(*arguments)[0]


def _forward(*arguments: Any) -> tuple[jax.Array, Any]:
    arrays, (scale, tiles) = arguments[:7], arguments[7:]
    run = functools.partial(_forward_here, scale=scale, tile=tiles.forward)
    out, log_sum = map(dear, per_device(run, _INPUTS, (_QUERY, _ROWS))(*arrays))
    return out, (arrays, out, log_sum)


def _backward(scale: float, tiles: Tiles, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    arrays, out, log_sum = kept
    run = functools.partial(_backward_here, scale=scale, tiles=tiles)
    split = per_device(run, (*_INPUTS, _QUERY, _ROWS, _QUERY), _INPUTS[:5])
    return *split(*arrays, out, log_sum, d_out), None, None


_attention.defvjp(_forward, _backward)


def _views(arrays: Sequence[jax.Array]) -> tuple[_Shape, jax.Array, list[jax.Array]]:
    """(shape, query rows [B, A*G*N, H], own keys and values [B, A*E, K, H])."""
    query, context_key, block_key, block_value = arrays[0], arrays[1], arrays[3], arrays[4]
    b, a, g, k, r, h = query.shape
    e = block_key.shape[2]
    shape = _Shape(a, g, e, k * r, k, context_key.shape[1], r)
    return shape, query.reshape(b, -1, h), [x.reshape(b, a * e, k, h) for x in (block_key, block_value)]


def _forward_here(*arrays: jax.Array, scale: float, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """(out, log-sums [B, K, A*G*R]) on one device."""
    shape, query, own = _views(arrays)
    limit, first = arrays[5:7]
    table, _, end = _tables(limit, first, shape, tile)
    log_sum = jax.ShapeDtypeStruct((len(query), shape.k, shape.rows), jnp.float32)
    kernel = functools.partial(_forward_kernel, shape=shape, tile=tile, factor=scale * LOG2E)
    inputs = [query, *arrays[1:3], *own, limit, first, table, end]
    out, log_sum = _call(kernel, table.shape[1], tile, inputs, [query, log_sum], shape)
    return out.reshape(arrays[0].shape), log_sum


def _backward_here(*arrays: jax.Array, scale: float, tiles: Tiles) -> tuple[jax.Array, ...]:
    """Gradients of the five arrays on one device."""
    shape, query, own = _views(arrays)
    context, limit, first = arrays[1:3], arrays[5], arrays[6]
    out, log_sum, d_out = arrays[7].reshape(query.shape), arrays[8], arrays[9].reshape(query.shape)
    factors = {"shape": shape, "factor": scale * LOG2E, "scale": scale}

    table, _, end = _tables(limit, first, shape, tiles.dq)
    kernel = functools.partial(_dq_kernel, tile=tiles.dq, **factors)
    inputs = [query, *context, *own, limit, first, table, end, out, d_out, log_sum]
    dq, delta = _call(kernel, table.shape[1], tiles.dq, inputs, [query, log_sum], shape)

    _, table, _ = _tables(limit, first, shape, tiles.dkv)
    last = jnp.concatenate([limit, jnp.max(limit, axis=1, keepdims=True)], axis=1)  # one more: the last kept anchor
    kernel = functools.partial(_dkv_kernel, tile=tiles.dkv, **factors)
    inputs = [query, *context, last, first, table, d_out, log_sum, delta]
    dk, dv = _call(kernel, table.shape[1], tiles.dkv, inputs, context, shape)

    rows = tiles.own.rows  # of several blocks, or a part of one
    blocks = max(1, rows // shape.per_block)
    kernel = functools.partial(_own_kernel, blocks=blocks, rows=rows, keys=power_of_two(blocks * shape.e), **factors)
    inputs = [query, *own, limit, d_out, log_sum, delta]
    d_own = _call(kernel, pl.cdiv(shape.a, blocks), tiles.own, inputs, own, shape)
    return dq.reshape(arrays[0].shape), dk, dv, *(x.reshape(arrays[3].shape) for x in d_own)


def _call(
    kernel: Callable[..., None], count: int, tile: Tile, inputs: Sequence[jax.Array], outputs: Any, shape: _Shape
) -> Any:
    """A kernel over (key head, tile, sequence). Arrays with an axis K are cut along it, the others are whole."""

    def spec(x: Any) -> pl.BlockSpec:
        if x.ndim == 4:  # [B, rows, K, H]
            return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda k, t, b: (b, 0, k, 0))
        if x.shape[1:] == (shape.k, shape.rows):
            return pl.BlockSpec((None, None, shape.rows), lambda k, t, b: (b, k, 0))
        return pl.BlockSpec((None, *x.shape[1:]), lambda k, t, b: (b,) + (0,) * (x.ndim - 1))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
    specs = [spec(x) for x in inputs], [spec(x) for x in shapes]
    grid = (shape.k, count, len(inputs[0]))
    return triton.call(kernel, inputs, specs[0], shapes, specs[1], grid=grid, warps=tile.warps, stages=tile.stages)


# Which tiles see which.


def _tables(limit: jax.Array, first: jax.Array, shape: _Shape, tile: Tile) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs of key tiles per row tile [B, T, 4] and of row tiles per key tile [B, J, 4], end row per row tile [B, T]."""
    count = pl.cdiv(shape.rows, tile.rows)
    row = jnp.minimum(jnp.arange(count * tile.rows), shape.rows - 1).reshape(count, tile.rows)
    limit, first = (x[:, row // shape.per_block] for x in (limit, first))  # [B, T, rows]
    active, full = sights(limit, first, tile.keys, pl.cdiv(shape.s, tile.keys))
    ends = jnp.max(limit, -1).astype(jnp.int32)
    return runs(active, full), runs(active.swapaxes(1, 2), full.swapaxes(1, 2)), ends


# Parts of kernels. References: query, out and d_out [A*G*N, H] of all heads; keys and values [rows, H] of one head;
# limit and first [A]; log-sum and delta [A*G*R] of one head.


class _Rows(NamedTuple):
    """Query rows of one head.

    Attributes:
      number: [T] among the A*G*R rows; beyond them there is none.
      place: [T] row of the references of all heads.
      block: [T].
      limit: [T] context rows before it are seen; -1 = the row is nobody's.
      there: [T] bool, whether there is such a row.
    """

    number: jax.Array
    place: jax.Array
    block: jax.Array
    limit: jax.Array
    there: jax.Array

    @classmethod
    def of(cls, head: Any, start: Any, size: int, limit_ref: Any, shape: _Shape) -> "_Rows":
        """`size` rows from `start` on of a key head."""
        number = numbers(size, start)
        step = lax.div(number, shape.r)
        block = lax.div(number, shape.per_block)
        place = step * shape.n + head * shape.r + (number - step * shape.r)
        there = number < shape.rows
        return cls(number, place, block, load(limit_ref, block, there, -1), there)

    @property
    def kept(self) -> jax.Array:
        """[T] bool, rows of blocks that are kept."""
        return self.limit >= 0

    def take(self, ref: Any, mask: jax.Array) -> jax.Array:
        """Their rows of `ref` [A*G*N, H] where the mask holds, else 0."""
        return load(ref, rows_of(ref, self.place), mask[:, None], 0.0)


def _own_range(tile: Any, rows: int, shape: _Shape) -> tuple[Any, int]:
    """Own keys of the blocks of a row tile: the first one, and room for all of them."""
    exact = rows % shape.per_block == 0
    blocks = rows // shape.per_block if exact else (rows - 2) // shape.per_block + 2
    return lax.div(tile * rows, shape.per_block) * shape.e, power_of_two(blocks * shape.e)


def _own(first: Any, size: int, limit_ref: Any, refs: Sequence[Any], shape: _Shape) -> tuple[jax.Array, ...]:
    """Own keys from `first` on: the block of each (-1 where it is not kept), keys and values."""
    index = numbers(size, first)
    block = lax.div(index, shape.e)
    there = index < shape.a * shape.e
    there &= load(limit_ref, block, there, -1) >= 0
    return jnp.where(there, block, -1), *(load(ref, rows_of(ref, index), there[:, None], 0.0) for ref in refs)


# Kernels.


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, own_k_ref: Any, own_v_ref: Any, limit_ref: Any, first_ref: Any,
    runs_ref: Any, end_ref: Any, out_ref: Any, log_sum_ref: Any, *, shape: _Shape, tile: Tile, factor: float,
) -> None:  # fmt: skip
    head, number = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1)  # the longest tiles first
    rows = _Rows.of(head, number * tile.rows, tile.rows, limit_ref, shape)
    first, end = load(first_ref, rows.block, rows.there), end_ref[number]
    q = rows.take(q_ref, rows.kept)

    # The own block comes first: after it every row has a real maximum.
    own_range = _own_range(number, tile.rows, shape)
    key_block, key, value = _own(*own_range, limit_ref, (own_k_ref, own_v_ref), shape)
    same = rows.block[:, None] == key_block
    carry = nothing_seen(tile.rows, q_ref.shape[1])
    carry = add_scores(jnp.where(same, dot(q, key.T) * factor, MASKED), value, carry)

    def body(masked: bool) -> Callable[..., Any]:
        def step(j: Any, carry: Any) -> Any:
            row, key, value = tile_of_keys(j, tile.keys, end, (k_ref, v_ref), masked=masked)
            scores = dot(q, key.T) * factor
            if masked:
                scores = jnp.where(sees(row, first[:, None], rows.limit[:, None]), scores, MASKED)
            return add_scores(scores, value, carry)

        return step

    top, total, out = walk(runs_ref, number, body, carry)
    out = jnp.where(rows.kept[:, None], out / total[:, None], 0.0)
    store(out_ref, rows_of(out_ref, rows.place), out, rows.there[:, None])
    log_sum = jnp.where(rows.kept, top + jnp.log2(total), _NOBODY)
    store(log_sum_ref, pl.ds(number * tile.rows, tile.rows), log_sum, rows.there)


def _dq_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, own_k_ref: Any, own_v_ref: Any, limit_ref: Any, first_ref: Any,
    runs_ref: Any, end_ref: Any, out_ref: Any, d_out_ref: Any, log_sum_ref: Any, dq_ref: Any, delta_ref: Any,
    *, shape: _Shape, tile: Tile, factor: float, scale: float,
) -> None:  # fmt: skip
    head, number = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1)
    rows = _Rows.of(head, number * tile.rows, tile.rows, limit_ref, shape)
    first, end = load(first_ref, rows.block, rows.there), end_ref[number]
    q, out, d_out = (rows.take(ref, rows.kept) for ref in (q_ref, out_ref, d_out_ref))
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=1)
    place = pl.ds(number * tile.rows, tile.rows)
    log_sum = load(log_sum_ref, place, rows.there, _NOBODY)

    def add(dq: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array | None) -> jax.Array:
        weights = jnp.exp2(dot(q, key.T) * factor - log_sum[:, None])
        slope = weights * (dot(d_out, value.T) - delta[:, None])
        if visible is not None:
            slope = jnp.where(visible, slope, 0.0)
        return dq + dot(slope.astype(key.dtype), key)

    own_range = _own_range(number, tile.rows, shape)
    key_block, key, value = _own(*own_range, limit_ref, (own_k_ref, own_v_ref), shape)
    dq = add(jnp.zeros(q.shape, jnp.float32), key, value, rows.block[:, None] == key_block)

    def body(masked: bool) -> Callable[..., Any]:
        def step(j: Any, dq: jax.Array) -> jax.Array:
            row, key, value = tile_of_keys(j, tile.keys, end, (k_ref, v_ref), masked=masked)
            return add(dq, key, value, sees(row, first[:, None], rows.limit[:, None]) if masked else None)

        return step

    dq = walk(runs_ref, number, body, dq) * scale
    store(dq_ref, rows_of(dq_ref, rows.place), dq, rows.there[:, None])
    store(delta_ref, place, delta, rows.there)


def _key_gradients(
    q: jax.Array, d_out: jax.Array, log_sum: jax.Array, delta: jax.Array, key: jax.Array, value: jax.Array,
    visible: jax.Array | None, factor: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(dk / scale, dv) of some keys from some rows; scores are transposed, [keys, rows]."""
    weights = jnp.exp2(dot(key, q.T) * factor - log_sum[None, :])
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    slope = weights * (dot(value, d_out.T) - delta[None, :])
    return dot(slope.astype(q.dtype), q), dot(weights.astype(d_out.dtype), d_out)


def _dkv_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, limit_ref: Any, first_ref: Any, runs_ref: Any, d_out_ref: Any,
    log_sum_ref: Any, delta_ref: Any, dk_ref: Any, dv_ref: Any,
    *, shape: _Shape, tile: Tile, factor: float, scale: float,
) -> None:  # fmt: skip
    head, number = pl.program_id(0), pl.program_id(1)  # the first key tile is seen by the most rows
    row, key, value = tile_of_keys(number, tile.keys, limit_ref[shape.a], (k_ref, v_ref), masked=True)

    def body(masked: bool) -> Callable[..., Any]:
        def step(i: Any, carry: Any) -> Any:
            rows = _Rows.of(head, i * tile.rows, tile.rows, limit_ref, shape)
            q, d_out = (rows.take(ref, rows.kept) for ref in (q_ref, d_out_ref))
            place = pl.ds(i * tile.rows, tile.rows)
            log_sum, delta = load(log_sum_ref, place, rows.there, _NOBODY), load(delta_ref, place, rows.there, 0.0)
            visible = None
            if masked:
                visible = sees(row[:, None], load(first_ref, rows.block, rows.there), rows.limit)
            dk, dv = _key_gradients(q, d_out, log_sum, delta, key, value, visible, factor)
            return carry[0] + dk, carry[1] + dv

        return step

    zero = jnp.zeros(key.shape, jnp.float32)
    dk, dv = walk(runs_ref, number, body, (zero, zero))
    place, there = (pl.ds(number * tile.keys, tile.keys), slice(None)), (row < shape.s)[:, None]
    store(dk_ref, place, dk * scale, there)
    store(dv_ref, place, dv, there)


def _own_kernel(
    q_ref: Any, own_k_ref: Any, own_v_ref: Any, limit_ref: Any, d_out_ref: Any, log_sum_ref: Any, delta_ref: Any,
    dk_ref: Any, dv_ref: Any, *, shape: _Shape, blocks: int, rows: int, keys: int, factor: float, scale: float,
) -> None:  # fmt: skip
    head, first = pl.program_id(0), pl.program_id(1) * blocks
    key_block, key, value = _own(first * shape.e, keys, limit_ref, (own_k_ref, own_v_ref), shape)

    def part(i: Any, carry: Any) -> Any:
        own_rows = _Rows.of(head, first * shape.per_block + i * rows, rows, limit_ref, shape)
        mine = own_rows.kept & (own_rows.block < first + blocks)
        q, d_out = (own_rows.take(ref, mine) for ref in (q_ref, d_out_ref))
        log_sum, delta = load(log_sum_ref, own_rows.number, mine, _NOBODY), load(delta_ref, own_rows.number, mine, 0.0)
        same = key_block[:, None] == own_rows.block
        dk, dv = _key_gradients(q, d_out, log_sum, delta, key, value, same, factor)
        return carry[0] + dk, carry[1] + dv

    zero = jnp.zeros(key.shape, jnp.float32)
    parts = pl.cdiv(shape.per_block, rows)
    dk, dv = part(0, (zero, zero)) if parts == 1 else lax.fori_loop(0, parts, part, (zero, zero))
    index = numbers(keys, first * shape.e)
    there = (index < jnp.minimum((first + blocks) * shape.e, shape.a * shape.e))[:, None]
    store(dk_ref, rows_of(dk_ref, index), dk * scale, there)
    store(dv_ref, rows_of(dv_ref, index), dv, there)
