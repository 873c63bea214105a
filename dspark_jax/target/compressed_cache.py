"""What attention with compressed rows keeps of earlier rows: a window of them, compressed ones, and what becomes those.

Every array is written by position, so what was taken back needs no undoing. Compressed row w is made of the rows before
position (w + 1) m, and seen from the last of these on. A pass that begins at position p makes all of them that end at p
or later, also those that rows which were taken back had completed; those that end before p are of committed rows.

The rows that it needs for that are in rings: position p is in row p mod R. R is so large that what a pass overwrites
that is taken back later lies in front of all that a pass after it needs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.target.cache import StateCache
from dspark_jax.target.families.family import CompressedShape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedCache(StateCache):
    """The rows of a stack of layers; for passes of which up to P rows may be taken back.

    Attributes:
      rows: [L, B, window - 1 + P, H] keys, which are the values as well: a ring.
      raw: [L, B, s m - 1 + P, 2, s, H] what compressed rows are made of, and its gates, for each of s series: a ring.
      made: [L, B, C, H] compressed rows, in their order.
      index_raw: likewise, of the compressed rows of what chooses.
      index_made: likewise.
    """

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "rows": ("batch", None, None),
        "raw": ("batch", None, None, None, None),
        "made": ("batch", None, None),
        "index_raw": ("batch", None, None, None, None),
        "index_made": ("batch", None, None),
    }

    rows: Any
    raw: Any
    made: Any
    index_raw: Any
    index_made: Any

    @classmethod
    def zeros(
        cls,
        layers: int,
        batch: int,
        length: int,
        block: int,
        shape: CompressedShape,
        dtype: Any,
        *,
        separate: bool = False,
    ) -> "CompressedCache":
        """An empty cache for `length` positions and passes of which up to P = `block` rows may be taken back."""
        sizes: dict[str, Any] = {"rows": ((batch, shape.window - 1 + block, shape.width), dtype)}
        widths = {"": shape.width} if shape.rate else {}
        widths |= {"index_": shape.index.width} if shape.index else {}
        for name, width in widths.items():
            ring = shape.series * shape.rate - 1 + block
            sizes[f"{name}raw"] = ((batch, ring, 2, shape.series, width), dtype)
            sizes[f"{name}made"] = ((batch, max(length // shape.rate, 1), width), dtype)
        return cls.empty(layers, sizes, separate=separate)


def before(ring: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """ring [B, R, ...] -> the `count` rows before the positions `first` [B]; below 0 anything."""
    at = (first[:, None] - count + jnp.arange(count)) % ring.shape[1]
    return _taken(ring, at)


def with_rows(ring: jax.Array, rows: jax.Array, first: jax.Array, counts: jax.Array) -> jax.Array:
    """The ring with the last R of the first counts[b] rows [B, S, ...], of which the first is at position first[b]."""
    last = (first + counts - 1)[:, None]
    at = last - (last - jnp.arange(ring.shape[1])) % ring.shape[1] - first[:, None]  # which row belongs in each place
    new = _taken(rows.astype(ring.dtype), jnp.clip(at, 0, rows.shape[1] - 1))
    return jnp.where((at >= 0).reshape(*at.shape, *(1,) * (ring.ndim - 2)), new, ring)


def with_made(made: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Compressed rows [B, C, H] with new ones [B, n, H] at the places `at` [B, n]; those beyond the end are dropped."""
    return made.at[jnp.arange(len(made))[:, None], at].set(new.astype(made.dtype), mode="drop")


def _taken(rows: jax.Array, at: jax.Array) -> jax.Array:
    """rows [B, T, ...] at [B, n] -> [B, n, ...]."""
    return jnp.take_along_axis(rows, at.reshape(*at.shape, *(1,) * (rows.ndim - 2)), axis=1)
