"""`cached_attention` as Pallas kernels for NVIDIA GPUs: the visible rows of a cache are read once, and no others.

For one request and key head, its W*R query rows (R query heads read a key head) are one tile, or a few where heads are
so wide that they do not fit. What they see is shared out evenly to `splits` programs, so that few requests fill a card
as well: each walks over its part in tiles with an online softmax, and a second kernel joins the parts. Only tiles at
the ends of what is seen need a mask. Flat rows are read and written where they are.

    attend    grid (splits * row tiles, K, B)    out; or parts of it with their maxima and sums, float32
    join      grid (rows / some, K, B)           out
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax import platform
from dspark_jax.ops import triton
from dspark_jax.ops.cached_attention.rows import Rows
from dspark_jax.ops.cached_attention.stack import of_layer
from dspark_jax.ops.triton import LOG2E, MASKED, dot, load, numbers, power_of_two, rows_of, store
from dspark_jax.ops.triton_attention import ROOMY, nothing_seen
from dspark_jax.sharding import devices_here, per_device

_MOST_ROWS = 512
"""Query rows of a request and key head."""

_TILE_ROWS = 256
"""Of them in a tile: more take more registers than a program has."""

_ROW_BYTES = 64 << 10
"""Of the query rows in a tile, on cards with much shared memory; half of it on the others."""

_PROGRAMS = 528
"""Programs that fill a card: four on each of an H100's 132 multiprocessors."""


class _Case(NamedTuple):
    """What the kernels are specialised to: letters of the api, R = N / K, and sizes of tiles."""

    t: int
    w: int
    n: int
    r: int
    window: int
    front: int
    ring: int
    causal: bool
    factor: float
    rows: int
    tiles: int
    keys: int
    splits: int


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
    keys: int = 0,
    splits: int = 0,
    most: int = 0,
) -> jax.Array:
    """See `api.cached_attention`. Over a mesh, devices split the requests and the key heads.

    `keys` of a tile, `splits` and the `most` query rows of a tile (powers of two) are for tests; 0 = what suits the
    shapes.
    """
    del finite  # nothing that nobody sees is read
    key, value = of_layer(key, value, layer)
    (t, n, h), (_, k, c, _) = query.shape, key.shape
    rows_here, row_bytes = rows.most * (n // k), h * query.dtype.itemsize
    triton.check(
        the_head_width_is_no_power_of_two_from_16_to_512=h in triton.HEAD_WIDTHS,
        a_request_has_too_many_rows=rows_here <= _MOST_ROWS,
        flat_rows_of_several_devices_are_not_told_apart=rows.full or devices_here() == 1,
    )
    room = _ROW_BYTES if platform.gpu_shared_memory() >= ROOMY else _ROW_BYTES // 2
    size = min(power_of_two(rows_here), most or max(16, min(_TILE_ROWS, room // row_bytes)))
    case = _Case(
        t=t, w=rows.most, n=n, r=n // k, window=window, front=front, ring=c - 2 * front + 1, causal=causal,
        factor=scale * LOG2E, rows=size, tiles=pl.cdiv(rows_here, size), keys=keys or max(16, min(64, 8192 // h)),
        splits=splits,
    )  # fmt: skip
    run = functools.partial(_attend_here, case=case)
    numbers_of = (rows.offsets, rows.counts, rows.positions)
    own = () if sinks is None else (sinks.astype(jnp.float32).reshape(k, n // k),)
    if rows.full:  # [B, W, K, R, H], so that requests and key heads can be split over devices
        grouped = query.reshape(-1, rows.most, k, n // k, h)
        axes = ("batch", None, "kv_heads", None, None)
        cache = ("batch", "kv_heads", None, None)
        split = per_device(run, (axes, cache, cache, *[("batch",)] * 3, *(("kv_heads", None) for _ in own)), (axes,))
        return split(grouped, key, value, *numbers_of, *own)[0].reshape(query.shape)
    out = run(query.reshape(t, k, n // k, h), key, value, *numbers_of, *own)[0].reshape(query.shape)
    return jnp.where(rows.real[:, None, None], out, 0)


def _attend_here(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    offsets: jax.Array,
    counts: jax.Array,
    positions: jax.Array,
    *sinks: jax.Array,
    case: _Case,
) -> tuple[jax.Array]:
    """Query [.., K, R, H] of all flat rows -> heads in the same shape, on one device; sinks [K, R], or none."""
    b, k, c, h = key.shape
    flat = query.reshape(-1, h)  # [T*N, H]
    if query.ndim == 5:  # the requests of this device: their rows are counted from its first one
        offsets = offsets - offsets[0]
    length = min(c, case.window + case.w) if case.window else c
    splits = case.splits or _splits(b * k * case.tiles, length, case.keys)
    case = case._replace(n=k * case.r, t=flat.shape[0] // (k * case.r), splits=splits)
    one = pl.BlockSpec((1,), lambda i, j, b: (b,))
    cache = pl.BlockSpec((None, None, c, h), lambda i, j, b: (b, j, 0, 0))
    whole = pl.BlockSpec(flat.shape, lambda i, j, b: (0, 0))
    result = jax.ShapeDtypeStruct(flat.shape, flat.dtype)
    rows, all_rows = case.rows, case.rows * case.tiles
    number = pl.BlockSpec((None, None, None, rows), lambda i, j, b: (b, j, i % splits, i // splits))
    part = pl.BlockSpec((None, None, None, rows, h), lambda i, j, b: (b, j, i % splits, i // splits, 0))
    sums = jax.ShapeDtypeStruct((b, k, splits, all_rows), jnp.float32)
    parts = jax.ShapeDtypeStruct((b, k, splits, all_rows, h), jnp.float32)
    out = triton.call(
        functools.partial(_attend_kernel, case=case),
        (flat, key, value, offsets, counts, positions, *sinks),
        [whole, cache, cache, one, one, one, *(pl.BlockSpec((None, case.r), lambda i, j, b: (j, 0)) for _ in sinks)],
        result if splits == 1 else [parts, sums, sums],
        whole if splits == 1 else [part, number, number],
        grid=(splits * case.tiles, k, b),
        warps=4 if rows * h <= 64 * 128 else 8,
        stages=3 if h <= 128 else 2,
    )
    if splits > 1:
        some = max(1, min(rows, 64 // splits, 8192 // (splits * h)))
        number = pl.BlockSpec((None, None, splits, some), lambda i, j, b: (b, j, 0, i))
        part = pl.BlockSpec((None, None, splits, some, h), lambda i, j, b: (b, j, 0, i, 0))
        out = triton.call(
            functools.partial(_join_kernel, case=case, some=some),
            (*out, offsets, counts),
            [part, number, number, one, one],
            result,
            whole,
            grid=(all_rows // some, k, b),
            warps=4,
            stages=1,
        )
    return (out.reshape(query.shape),)


def _splits(requests: int, length: int, keys: int) -> int:
    """A power of two: programs enough to fill the card, each with a tile at least."""
    return 1 << max(0, min(_PROGRAMS // requests, length // keys).bit_length() - 1)


def _places(head: Any, row: jax.Array, offset: Any, case: _Case) -> tuple[jax.Array, jax.Array]:
    """Of a head's rows: the number of each among the request's W, and its place in [T*N, H]."""
    step = lax.div(row, case.r)
    return step, (offset + step) * case.n + head * case.r + (row - step * case.r)


def _attend_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, offset_ref: Any, count_ref: Any, position_ref: Any, *rest: Any, case: _Case,
) -> None:  # fmt: skip
    """The rest are sinks [R], if heads have any, and results: out, or parts with their maxima and sums."""
    results = 1 if case.splits == 1 else 3
    sinks_ref, (out_ref, *parts) = rest[:-results], rest[-results:]
    split, head = lax.rem(pl.program_id(0), case.splits), pl.program_id(1)
    position, count = position_ref[0], count_ref[0]
    end = jnp.where(count > 0, position + count, 0)  # after the last position that any row sees
    row = numbers(case.rows, lax.div(pl.program_id(0), case.splits) * case.rows)
    step, place = _places(head, row, offset_ref[0], case)
    real = step < count
    q = load(q_ref, rows_of(q_ref, place), real[:, None], 0.0)
    last = jnp.where(real, position + step if case.causal else end - 1, -1)  # that each row sees

    # Tiles of positions: all rows see those from `plain` to `ragged` whole, the others need a mask.
    begin = jnp.int32(0)
    plain = jnp.int32(0)
    if case.window:
        begin = jnp.maximum(position + 1 - case.window, 0)  # the first row's window
        plain = lax.div(jnp.maximum(end - case.window, 0) + (case.keys - 1), case.keys)
    ragged = lax.div(position + 1 if case.causal else end, case.keys)
    start = lax.div(begin, case.keys)
    tiles = lax.div(end + (case.keys - 1), case.keys) - start
    share = lax.div(tiles + (case.splits - 1), case.splits)
    first = start + split * share
    stop = start + jnp.minimum(split * share + share, tiles)
    plain = jnp.clip(plain, first, jnp.maximum(stop, first))
    ragged = jnp.clip(ragged, plain, jnp.maximum(stop, plain))

    def stored(ref: Any, tile: Any, masked: bool) -> jax.Array:
        position = numbers(case.keys, tile * case.keys)
        there = ((position >= begin) & (position < end))[:, None]
        if case.front:
            return load(ref, rows_of(ref, case.front + lax.rem(position, case.ring)), there, 0.0)
        slab = pl.ds(tile * case.keys, case.keys)
        return load(ref, (slab, slice(None)), there, 0.0) if masked else ref[slab, :]

    def walk(masked: bool) -> Any:
        masked = masked or case.keys > k_ref.shape[0]  # a tile longer than the cache is never seen whole

        def body(tile: Any, carry: Any) -> Any:
            top, total, out = carry
            key, value = (stored(ref, tile, masked) for ref in (k_ref, v_ref))
            scores = dot(q, key.T) * case.factor
            if masked:
                position = numbers(case.keys, tile * case.keys)[None, :]
                seen = position <= last[:, None]
                if case.window:
                    seen &= position > last[:, None] - case.window
                scores = jnp.where(seen, scores, MASKED)
            new = jnp.maximum(top, jnp.max(scores, axis=1))
            weights, shrink = jnp.exp2(scores - new[:, None]), jnp.exp2(top - new)
            if masked:  # a row that sees nothing of its first tiles must not count them
                weights = jnp.where(scores > 0.5 * MASKED, weights, 0.0)
            out = out * shrink[:, None] + dot(weights.astype(value.dtype), value)
            return new, total * shrink + jnp.sum(weights, axis=1), out

        return body

    top, total, out = nothing_seen(case.rows, q_ref.shape[1])
    if sinks_ref:  # they count once
        group = row - step * case.r
        top = jnp.where(split == 0, load(sinks_ref[0], group, real, 0.0) * LOG2E, top)
        total = jnp.where(split == 0, 1.0, total)
    carry = top, total, out
    carry = lax.fori_loop(first, plain, walk(True), carry)
    carry = lax.fori_loop(plain, ragged, walk(False), carry)
    top, total, out = lax.fori_loop(ragged, stop, walk(True), carry)
    if case.splits == 1:
        store(out_ref, rows_of(out_ref, place), out / jnp.maximum(total, 1e-30)[:, None], real[:, None])
    else:
        out_ref[...], parts[0][...], parts[1][...] = out, top, total


def _join_kernel(
    part_ref: Any, top_ref: Any, total_ref: Any, offset_ref: Any, count_ref: Any, out_ref: Any,
    *, case: _Case, some: int,
) -> None:  # fmt: skip
    """`some` rows of a request and head: all their parts at once."""
    group, head = pl.program_id(0), pl.program_id(1)
    step, place = _places(head, numbers(some, group * some), offset_ref[0], case)
    top = top_ref[...]  # [splits, some]
    weights = jnp.exp2(top - jnp.max(top, axis=0)[None, :])
    total = jnp.sum(total_ref[...] * weights, axis=0)
    out = jnp.sum(part_ref[...] * weights[:, :, None], axis=0) / jnp.maximum(total, 1e-30)[:, None]
    store(out_ref, rows_of(out_ref, place), out, (step < count_ref[0])[:, None])
