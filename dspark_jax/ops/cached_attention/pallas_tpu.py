"""`cached_attention` as a Pallas kernel for TPUs: the visible rows of a cache are read once, where they are, and no
others. Compiled for TPUs, and run in interpret mode; never run on a TPU.

The cache is cut into tiles of rows. What requests see is a list of work that XLA makes, (request, tile) one after the
other, so that nothing is fetched for what nobody sees and no request waits for the next one's first tile. A turn takes
one tile of all key heads of a group, and adds it to an online softmax of the request's W*R rows per key head.

    attend    grid (groups of key heads, work)    out
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dspark_jax import platform
from dspark_jax.ops import mosaic
from dspark_jax.ops.cached_attention.rows import Rows
from dspark_jax.ops.mosaic import MASKED, dot, numbers
from dspark_jax.sharding import devices_here, per_device, share

_MOST_ROWS = 512
"""Query rows of a request and key head."""

_TILE_BYTES = 1 << 20
"""Of a tile of keys, and one of values; each is held twice, since the next one is fetched meanwhile."""

_SCORES = 1 << 20
"""Of all key heads and rows over a tile; as many fit beside it with heads of 128."""

_USUAL = 12 << 20
"""Bytes on the chip for which no kernel has to ask."""

_WORK = 1 << 14
"""Tiles of all requests: entries of a table in scalar memory."""


class _Case(NamedTuple):
    """What the kernel is specialised to: letters of the api; `heads` of a group, cache rows of a tile."""

    w: int
    r: int
    window: int
    front: int
    causal: bool
    clears: bool
    scale: float
    heads: int
    keys: int
    length: int
    sinks: bool

    @property
    def rows(self) -> int:
        """Query rows of a request and key head."""
        return self.w * self.r

    @property
    def ring(self) -> int:
        """R of a ring."""
        return self.length - 2 * self.front + 1


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
) -> jax.Array:
    """See `api.cached_attention`. Over a mesh, devices split the requests and the key heads.

    `keys` of a tile is for tests; 0 = what suits the shapes.
    """
    (b, k, c, h), (_, n, _) = key.shape[-4:], query.shape
    case = _Case(
        w=rows.most, r=n // k, window=window, front=front, causal=causal, clears=not finite, scale=scale, heads=0,
        keys=keys, length=c, sinks=sinks is not None,
    )  # fmt: skip
    mosaic.check(
        the_head_width_is_no_multiple_of_16_up_to_512=h % 16 == 0 and h <= 512,
        the_type_is_neither_bfloat16_nor_float32=query.dtype in (jnp.bfloat16, jnp.float32),
        the_arrays_are_of_different_types=query.dtype == key.dtype == value.dtype,
        a_request_has_too_many_rows=case.rows <= _MOST_ROWS,
        there_are_too_many_tiles=share("batch", b) * pl.cdiv(c, keys or mosaic.LANES) <= _WORK,
        flat_rows_of_several_devices_are_not_told_apart=rows.full or devices_here() == 1,
    )
    stacks = (key[None], value[None]) if layer is None else (key, value)
    grouped = rows.pad(query).reshape(b, rows.most, k, n // k, h)
    number = jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)
    lowest = jnp.full((k, n // k), MASKED) if sinks is None else sinks.astype(jnp.float32).reshape(k, n // k)
    axes, cache = ("batch", None, "kv_heads", None, None), (None, "batch", "kv_heads", None, None)
    inputs = (axes, cache, cache, ("kv_heads", None), (None,), ("batch",), ("batch",))
    split = per_device(functools.partial(_attend_here, case=case), inputs, (axes,))
    out = split(grouped, *stacks, lowest, number, rows.counts, rows.positions)[0].reshape(b, rows.most, n, h)
    flat = rows.flatten(out)
    return flat if rows.full else jnp.where(rows.real[:, None, None], flat, 0)


def _attend_here(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array,
    layer: jax.Array,
    counts: jax.Array,
    positions: jax.Array,
    *,
    case: _Case,
) -> tuple[jax.Array]:
    """Query [B, W, K, R, H] -> heads in the same shape, on one device; caches are [L, B, K, C, H], sinks [K, R]."""
    b, k, c, h = key.shape[1:]
    heads = k // 2 if b == 1 and k % 2 == 0 else k  # two groups, for the two cores of a v5p
    most = min(_TILE_BYTES // (heads * h * key.dtype.itemsize), _SCORES // (heads * case.rows))
    most = most // mosaic.LANES * mosaic.LANES
    keys = case.keys or min(max(most, mosaic.LANES), 2048, pl.cdiv(c, mosaic.LANES) * mosaic.LANES)
    case = case._replace(heads=heads, keys=keys, clears=case.clears or c % keys > 0)
    needed = _memory(case, h, key.dtype.itemsize)
    mosaic.check(its_rows_do_not_fit_on_the_chip=needed <= platform.tpu_kernel_memory())
    tables = layer, counts, positions, *_work(counts, positions, case)
    rows = pl.BlockSpec((None, heads, case.rows, h), lambda g, i, *refs: (refs[3][i], g, 0, 0))
    tile = pl.BlockSpec((None, None, heads, keys, h), lambda g, i, *refs: (refs[0][0], refs[3][i], g, refs[4][i], 0))
    grouped = query.transpose(0, 2, 3, 1, 4).reshape(b, k, case.rows, h)
    lowest = jnp.repeat(sinks, case.w, axis=1)[..., None]  # [K, R*W, 1]
    own = pl.BlockSpec((heads, case.rows, 1), lambda g, i, *refs: (g, 0, 0))
    seen = min(c, case.window + case.w) if case.window else c
    out = mosaic.call(
        functools.partial(_kernel, case=case),
        tables,
        [grouped, key, value, lowest],
        [rows, tile, tile, own],
        jax.ShapeDtypeStruct(grouped.shape, query.dtype),
        rows,
        grid=(k // heads, tables[3].size),
        parallel=1,
        scratch=[pltpu.VMEM((heads, case.rows, size), jnp.float32) for size in (h, 1, 1)],
        flops=4 * b * k * case.rows * seen * h,
        exponentials=b * k * case.rows * seen,
        moved=2 * grouped.nbytes + 2 * b * k * seen * h * key.dtype.itemsize,
        memory=None if needed <= _USUAL else min(needed * 5 // 4, platform.tpu_kernel_memory()),
    )
    return (out.reshape(b, k, case.r, case.w, h).transpose(0, 3, 1, 2, 4),)


def _memory(case: _Case, h: int, itemsize: int) -> int:
    """Bytes on the chip: query and result twice, sums and two columns as wide as a register of all rows, tiles twice,
    and scores with their exponentials."""
    rows, tiles = case.heads * case.rows, case.heads * case.keys
    return rows * (4 * h * itemsize + 4 * h + 8 * mosaic.LANES) + 4 * tiles * h * itemsize + 8 * rows * case.keys


def _work(counts: jax.Array, positions: jax.Array, case: _Case) -> tuple[jax.Array, ...]:
    """Tables of the work: request and tile of each turn, each request's first and last tile, and the turns [1] that
    there are. Later turns hold what the last one holds, so that nothing moves."""
    end = positions + counts
    if case.front:
        begin, end = jnp.full_like(end, case.front), case.front + jnp.minimum(end, case.ring)
    else:
        begin = jnp.maximum(positions + 1 - case.window, 0) if case.window else jnp.zeros_like(end)
    first, last = begin // case.keys, (end - 1) // case.keys
    ends = jnp.cumsum(jnp.where(counts > 0, last - first + 1, 0))
    tiles = pl.cdiv(case.length, case.keys)
    if case.window and not case.front:
        tiles = min(tiles, pl.cdiv(case.window + case.w - 1, case.keys) + 1)
    turn = jnp.arange(counts.size * tiles)
    at = jnp.minimum(turn, jnp.maximum(ends[-1] - 1, 0))
    request = jnp.minimum(jnp.sum(at[:, None] >= ends, axis=1), counts.size - 1)
    tile = last[request] + 1 - (ends[request] - at)
    return tuple(x.astype(jnp.int32) for x in (request, tile, first, last, ends[-1:]))


def _kernel(
    layer_ref: Any, counts_ref: Any, positions_ref: Any, requests_ref: Any, tiles_ref: Any, first_ref: Any,
    last_ref: Any, turns_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, sinks_ref: Any, out_ref: Any, sum_ref: Any,
    top_ref: Any, total_ref: Any, *, case: _Case,
) -> None:  # fmt: skip
    """References: query and out [heads, W*R, H], row r*W + w; keys and values [heads, keys, H]; sinks [heads, W*R, 1];
    tables of `_work`."""
    del layer_ref
    turn = pl.program_id(1)
    request, tile = requests_ref[turn], tiles_ref[turn]
    position, count = positions_ref[request], counts_ref[request]
    real = turn < turns_ref[0]

    @pl.when(real & (tile == first_ref[request]))
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = sinks_ref[...]
        total_ref[...] = jnp.full_like(total_ref, 1.0 if case.sinks else 0.0)

    def add(masked: bool) -> None:
        mask = _seen(position, count, tile * case.keys, case) if masked else None
        there = _there(position, count, tile * case.keys, case) if masked and case.clears else None
        for head in range(case.heads):
            scores = dot(q_ref[head], k_ref[head], transposed=True) * case.scale
            scores = scores if mask is None else jnp.where(mask, scores, MASKED)
            value = v_ref[head] if there is None else jnp.where(there, v_ref[head], 0)
            before = top_ref[head]
            top_ref[head] = top = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            # A row that has seen nothing yet counts what is masked; its first real score takes that back.
            weights, shrink = jnp.exp(scores - top), jnp.exp(before - top)
            total_ref[head] = total_ref[head] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            sum_ref[head] = sum_ref[head] * shrink + dot(weights.astype(value.dtype), value)

    begin, end = tile * case.keys, (tile + 1) * case.keys
    whole = jnp.bool_(False)
    if not case.front:
        whole = end <= position + (1 if case.causal else count)
        if case.window:
            whole &= begin >= position + count - case.window
    pl.when(real & whole)(lambda: add(masked=False))
    pl.when(real & ~whole)(lambda: add(masked=True))

    @pl.when(real & (tile == last_ref[request]))
    def _() -> None:
        out_ref[...] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)


def _seen(position: Any, count: Any, begin: Any, case: _Case) -> jax.Array:
    """[W*R, keys]: which rows of a request see which of the cache's rows from `begin` on."""
    size = case.rows, case.keys
    step = jnp.minimum(lax.rem(numbers((case.rows, 1), 0), case.w), count - 1)  # rows after the last are like it
    step = step if case.causal else jnp.full_like(step, count - 1)
    row, last = numbers(size, 1) + begin, position + step
    if case.front:
        age = _age(lax.rem(position, case.ring) + step, row, case)
        return (age >= 0) & (age < jnp.minimum(case.window, last + 1))
    seen = row <= last
    return seen & (row > last - case.window) if case.window else seen


def _there(position: Any, count: Any, begin: Any, case: _Case) -> jax.Array:
    """[keys, 1]: which of the cache's rows from `begin` on any row of a request sees."""
    row, end = numbers((case.keys, 1), 0) + begin, position + count
    if case.front:
        age = _age(lax.rem(position, case.ring) + count - 1, row, case)
        return (age >= 0) & (age < jnp.minimum(case.window + count - 1, end))
    there = row < end
    return there & (row > position - case.window) if case.window else there


def _age(last: Any, row: jax.Array, case: _Case) -> jax.Array:
    """How many positions before the one in row front + last % R of a ring a row is; -1 outside of the ring."""
    age = last - (row - case.front)  # within (-R, 2 R)
    age = jnp.where(age < 0, age + case.ring, age)
    age = jnp.where(age >= case.ring, age - case.ring, age)
    return jnp.where((row >= case.front) & (row < case.front + case.ring), age, -1)
