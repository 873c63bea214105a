"""What the GPU kernels of attention over many rows share: tiles, which of them see each other, and an online softmax.

A tile of rows walks over the tiles of keys that it sees; only those in which a limit or a first key of a row lies need
a mask.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax import platform
from dspark_jax.ops.sights import FAR
from dspark_jax.ops.triton import MASKED, dot, load, numbers


class Tile(NamedTuple):
    """Sizes of one kernel: query rows and keys of a tile, warps of a program, loads under way at once."""

    rows: int
    keys: int
    warps: int
    stages: int

    @classmethod
    def forward(cls, row_bytes: int) -> "Tile":
        """Of a forward pass, for heads of so many bytes on this card."""
        if row_bytes <= 256:
            return cls(128, 64, 8, 3) if platform.gpu_shared_memory() >= ROOMY else cls(64, 64, 4, 2)
        return cls(64, 32, 8, 2) if row_bytes <= 512 else cls(32, 32, 8, 2)


ROOMY = 160 << 10
"""Bytes of shared memory that the sizes of an H100 take; an A100 has as much, the cards for workstations do not."""


def runs(active: jax.Array, full: jax.Array) -> jax.Array:
    """Four borders [.., 4] int32 of three runs of tiles [.., n]: to be masked, seen whole, to be masked."""
    n = active.shape[-1]
    i = jnp.arange(n)
    low = jnp.min(jnp.where(active, i, n), -1)
    high = jnp.max(jnp.where(active, i + 1, 0), -1)
    start = jnp.min(jnp.where(full, i, FAR), -1)
    stop = jnp.min(jnp.where(~full & (i > start[..., None]), i, n), -1)
    start, stop = jnp.minimum(start, high), jnp.where(start < n, stop, high)
    return jnp.stack([low, jnp.maximum(start, low), stop, high], -1).astype(jnp.int32)


def walk(runs_ref: Any, tile: Any, body: Callable[[bool], Callable[..., Any]], carry: Any) -> Any:
    """Applies `body(masked)(number, carry)` to the three runs of a table's row."""
    borders = [runs_ref[tile, i] for i in range(4)]
    for index, masked in enumerate((True, False, True)):
        carry = lax.fori_loop(borders[index], borders[index + 1], body(masked), carry)
    return carry


def tile_of_keys(number: Any, size: int, end: Any, refs: Sequence[Any], *, masked: bool) -> tuple[jax.Array, ...]:
    """A tile: numbers of its keys, keys and values; those from `end` on are 0, they may hold NaN."""
    row, place = numbers(size, number * size), pl.ds(number * size, size)
    if masked or size > refs[0].shape[0]:  # a tile longer than all keys is never seen whole
        there = (row < end)[:, None]
        return row, *(load(ref, (place, slice(None)), there, 0.0) for ref in refs)
    return row, *(ref[place, :] for ref in refs)


def sees(row: jax.Array, first: jax.Array, limit: jax.Array) -> jax.Array:
    """Which keys are seen; the arguments broadcast."""
    return (row >= first) & (row < limit)


Carry = tuple[jax.Array, jax.Array, jax.Array]
"""Maximum (to base 2) and sum of each row [rows], and the weighted sum of values [rows, H]."""


def nothing_seen(rows: int, width: int) -> Carry:
    """Before the first tile."""
    return (
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )


def add_scores(scores: jax.Array, value: jax.Array, carry: Carry) -> Carry:
    """With one tile more, scores [rows, keys] to base 2.

    A row that has seen nothing yet counts what is masked; its first real score takes that back.
    """
    top, total, out = carry
    new = jnp.maximum(top, jnp.max(scores, axis=1))
    weights, shrink = jnp.exp2(scores - new[:, None]), jnp.exp2(top - new)
    out = out * shrink[:, None] + dot(weights.astype(value.dtype), value)
    return new, total * shrink + jnp.sum(weights, axis=1), out
