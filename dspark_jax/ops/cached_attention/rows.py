"""Which flat rows belong to which request."""

import dataclasses

import jax
import jax.numpy as jnp

# Flat rows, drawn: three requests (B = 3) of up to four rows (W = 4) in T = 8 flat rows; counts 3, 1, 2 and
# positions 17, 5, 40.
#
#     flat row   0  1  2 |  3 |  4  5 |  6  7
#     owner      0  0  0 |  1 |  2  2 |  3  3     3 = B: nobody's
#     index      0  1  2 |  0 |  0  1 |  6  7     of nobody's rows it means nothing
#     at        17 18 19 |  5 | 40 41 |  0  0
#     offsets    0          3    4
#
# `padded`, the flat rows of each request: 0 1 2 3 / 3 4 5 6 / 4 5 6 7. Past its count a request has others' rows
# (row 3 in the first one's is the second request's), which whoever reads them has to mask.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """T flat rows of B requests, one request's rows after the other's; what is left over belongs to nobody.

    Attributes:
      offsets: [B] int32, first flat row of each request.
      counts: [B] int32, rows of each request, 0..most.
      positions: [B] int32, absolute position of each request's first row; the others follow it.
      owner: [T] int32, request of each flat row; B where there is none.
      index: [T] int32, number of each row among its request's.
      most: W, static: most rows of a request.
      full: static: every request has W rows, so nothing has to be looked for (or collected from other devices).
    """

    offsets: jax.Array
    counts: jax.Array
    positions: jax.Array
    owner: jax.Array
    index: jax.Array
    most: int = dataclasses.field(metadata={"static": True})
    full: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, counts: jax.Array, positions: jax.Array, *, size: int, most: int) -> "Rows":
        """Rows of `counts` [B] (each at most `most`, together at most `size` = T) from `positions` [B] on."""
        ends = jnp.cumsum(counts)
        offsets = (ends - counts).astype(jnp.int32)
        row = jnp.arange(size)
        owner = jnp.sum(row[:, None] >= ends, axis=1, dtype=jnp.int32)
        padded = jnp.append(offsets, 0)
        return cls(offsets, counts.astype(jnp.int32), positions, owner, (row - padded[owner]).astype(jnp.int32), most)

    @classmethod
    def whole(cls, positions: jax.Array, most: int) -> "Rows":
        """`most` rows of every request, from `positions` [B] on."""
        batch = len(positions)
        owner, index = jnp.divmod(jnp.arange(batch * most, dtype=jnp.int32), most)
        offsets, counts = jnp.arange(0, batch * most, most, dtype=jnp.int32), jnp.full((batch,), most, jnp.int32)
        return cls(offsets, counts, positions, owner, index, most, full=True)

    @property
    def at(self) -> jax.Array:
        """[T] absolute position of each flat row; 0 for nobody's."""
        return jnp.where(self.real, jnp.append(self.positions, 0)[self.owner] + self.index, 0)

    @property
    def real(self) -> jax.Array:
        """[T] bool, rows that belong to a request."""
        return self.owner < len(self.counts)

    @property
    def padded(self) -> jax.Array:
        """[B, W] flat row of each request's rows; any row of the array past its count."""
        return jnp.minimum(self.offsets[:, None] + jnp.arange(self.most), len(self.owner) - 1)

    def flatten(self, values: jax.Array) -> jax.Array:
        """values [B, W, ...] -> [T, ...]; nobody's rows hold anything finite that `values` holds."""
        if self.full:
            return values.reshape(-1, *values.shape[2:])
        owner = jnp.minimum(self.owner, len(self.counts) - 1)
        return values[owner, jnp.minimum(self.index, self.most - 1)]

    def pad(self, values: jax.Array) -> jax.Array:
        """values [T, ...] -> [B, W, ...]; past a request's count are rows of others."""
        if self.full:
            return values.reshape(-1, self.most, *values.shape[1:])
        return values[self.padded]
