"""`cache_write` as a Pallas kernel for TPUs, where XLA makes a loop over the requests of it, with some twenty small
programs for each. Compiled for TPUs, and run in interpret mode; never run on a TPU.

A request's rows lie in a few tiles of the cache. Each of them is read, gets the rows that belong into it, and is
written back where it was. What a tile becomes does not depend on how often that is done, so a tile may come twice.

    write   grid (requests, tiles of all places)    both caches, in place
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dspark_jax.ops import mosaic
from dspark_jax.ops.cache_write.xla import CACHE, NEW
from dspark_jax.ops.mosaic import numbers
from dspark_jax.sharding import per_device

_ROWS = 16
"""Of a tile: two of bfloat16 lie in a register's row of 32 bits, of which a register has eight."""

_MOST_ROWS = 64
"""New rows of a request."""

_TILE_BYTES = 1 << 20
"""Of a tile; eight are on the chip."""


def cache_write(
    key: jax.Array,
    value: jax.Array,
    new_key: jax.Array,
    new_value: jax.Array,
    places: jax.Array,
    *,
    layer: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """See `api.cache_write`. Over a mesh, devices split the requests and the key heads."""
    (_, _, k, c, h), t = key.shape, new_key.shape[2]
    mosaic.check(
        a_cache_is_no_whole_number_of_tiles=c % _ROWS == 0,
        there_are_many_rows=t <= _MOST_ROWS,
        a_tile_is_too_large=k * _ROWS * h * key.dtype.itemsize <= _TILE_BYTES,
        the_type_is_neither_bfloat16_nor_float32=key.dtype in (jnp.bfloat16, jnp.float32),
        the_arrays_are_of_different_types=len({x.dtype for x in (key, value, new_key, new_value)}) == 1,
    )
    number = jnp.asarray(layer, jnp.int32).reshape(1)
    split = per_device(_write_here, (CACHE, CACHE, NEW, NEW, (None, "batch"), (None,)), (CACHE, CACHE))
    key, value = split(key, value, new_key, new_value, places.astype(jnp.int32), number)
    return key, value


def _write_here(
    key: jax.Array, value: jax.Array, new_key: jax.Array, new_value: jax.Array, places: jax.Array, layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The caches, on one device."""
    (_, b, k, c, h), t = key.shape, new_key.shape[2]
    each = (t + _ROWS - 2) // _ROWS + 1  # tiles that T rows can lie in
    turns = len(places) * each
    first = jnp.where(places >= 0, places // _ROWS, places[:1] // _ROWS)[..., None]  # [P, B, 1]
    tiles = jnp.clip(first + jnp.arange(each), 0, c // _ROWS - 1).swapaxes(0, 1).reshape(-1)
    cache = pl.BlockSpec(
        (None, None, k, _ROWS, h), lambda i, turn, layer, _, tiles: (layer[0], i, 0, tiles[i * turns + turn], 0)
    )
    new = pl.BlockSpec((None, k, t, h), lambda i, turn, *_: (i, 0, 0, 0))
    moved = 4 * b * turns * k * _ROWS * h * key.dtype.itemsize + 2 * new_key.nbytes
    out: Any = mosaic.call(
        functools.partial(_kernel, count=len(places), requests=b, turns=turns),
        (layer, places.reshape(-1), tiles.astype(jnp.int32)),
        [key, value, new_key, new_value],
        [cache, cache, new, new],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        [cache, cache],
        grid=(b, turns),
        parallel=1,
        moved=moved,
        in_place=(0, 1),
        keeps=True,
    )
    return out[0], out[1]


def _kernel(
    _: Any, places_ref: Any, tiles_ref: Any, key_ref: Any, value_ref: Any, new_key_ref: Any, new_value_ref: Any,
    key_out_ref: Any, value_out_ref: Any, *, count: int, requests: int, turns: int,
) -> None:  # fmt: skip
    """References: tiles [K, rows, H], new rows [K, T, H]; tables in scalar memory."""
    request, turn = pl.program_id(0), pl.program_id(1)
    heads, t, h = new_key_ref.shape
    row = numbers((_ROWS, h), 0) + tiles_ref[request * turns + turn] * _ROWS
    at = [places_ref[place * requests + request] for place in range(count)]
    for old_ref, new_ref, out_ref in (
        (key_ref, new_key_ref, key_out_ref), (value_ref, new_value_ref, value_out_ref)
    ):  # fmt: skip
        for head in range(heads):
            tile = old_ref[head].astype(jnp.float32)
            new = new_ref[head].astype(jnp.float32)
            for first in at:
                for number in range(t):
                    here = (row == first + number) & (first >= 0)
                    tile = jnp.where(here, new[number : number + 1], tile)
            out_ref[head] = tile.astype(out_ref.dtype)
