"""Which tiles of keys the rows of a tile see, for kernels of attention over many rows."""

import jax
import jax.numpy as jnp

FAR = 1 << 30
"""A number of a key after all others."""


def sights(limit: jax.Array, first: jax.Array, keys: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Whether the rows of each tile see a part, and all, of each of `count` tiles of so many `keys`, [..., count].

    Args:
      limit: [..., rows] a row sees the keys first..limit-1; negative: the row is nobody's.
      first: [..., rows].
      keys: of a tile.
      count: of tiles.
    """
    kept = limit >= 0
    lowest, highest = jnp.min(jnp.where(kept, limit, FAR), -1), jnp.max(limit, -1)
    earliest, latest = jnp.min(jnp.where(kept, first, FAR), -1), jnp.max(jnp.where(kept, first, 0), -1)
    begin = jnp.arange(count) * keys
    active = (highest[..., None] > begin) & (earliest[..., None] < begin + keys)
    return active, active & (lowest[..., None] >= begin + keys) & (latest[..., None] <= begin)
