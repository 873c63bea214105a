"""What experts are made of."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Inner = Callable[[jax.Array, jax.Array], jax.Array]
"""(gate, up) [..., F] -> what goes down [..., F], each number by itself."""


class Parts(NamedTuple):
    """Matrices and biases of E experts, D wide outside and F inside; biases are None where there are none.

    Attributes:
      gate: [E, D, F], or those of a stack of layers, [L, E, D, F].
      up: likewise.
      down: [E, F, D] or [L, E, F, D].
      gate_bias: [E, F], never a stack.
      up_bias: [E, F].
      down_bias: [E, D].
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None

    @property
    def count(self) -> int:
        """E."""
        return self.gate.shape[-3]

    def of(self, expert: jax.Array) -> "Parts":
        """Those of one expert, or of several, of one layer."""
        return jax.tree.map(lambda part: part[expert], self)

    def of_layer(self, layer: jax.Array | int | None) -> "Parts":
        """Those of a layer of a stack; None: they are no stack."""
        if layer is None:
            return self

        def pick(stack: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)

        return self._replace(gate=pick(self.gate), up=pick(self.up), down=pick(self.down))

    def through(self, product: Callable[..., jax.Array], rows: jax.Array, inner: Inner) -> jax.Array:
        """What the rows become; `product` multiplies rows with matrices, and the biases are one for each row."""
        gates, up = product(rows, self.gate), product(rows, self.up)
        if self.gate_bias is not None and self.up_bias is not None:
            gates, up = gates + self.gate_bias, up + self.up_bias
        out = product(inner(gates, up), self.down)
        return out if self.down_bias is None else out + self.down_bias


def by_expert(chosen: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Pairs of row and expert, those of an expert after each other.

    Args:
      chosen: [P] experts of the pairs; others than 0 to count - 1 are none.
      count: E.

    Returns:
      The pairs in that order [P], those of no expert last, and how many each expert has, [E] int32.
    """
    expert = jnp.where((chosen >= 0) & (chosen < count), chosen, count)
    return jnp.argsort(expert, stable=True), jnp.bincount(expert, length=count + 1)[:-1].astype(jnp.int32)


class Tiles(NamedTuple):
    """Pairs of row and expert laid out for kernels: expert after expert, each filled up to whole tiles of M rows.

    Attributes:
      expert: [N] int32, whose tile each is; of those that are not active, the last active one's.
      active: [1] int32, how many there are; N is the most there can be.
      source: [N M] int32, the row that each place has; any where it has none.
      places: [T, k] int32, where each pair is; N M for those of no expert.
    """

    expert: jax.Array
    active: jax.Array
    source: jax.Array
    places: jax.Array

    @classmethod
    def of(cls, chosen: jax.Array, count: int, rows: int) -> "Tiles":
        """Those of chosen [T, k] among `count` experts, of so many rows each."""
        k, pairs = chosen.shape[1], chosen.size
        order, sizes = by_expert(chosen.reshape(-1), count)
        tiles = -(-sizes // rows)
        most, ends = min(pairs, count) + pairs // rows, jnp.cumsum(tiles)
        # All compared with all: a search is a loop, of small programs on a TPU.
        find = functools.partial(jnp.searchsorted, side="right", method="compare_all")
        expert = find(ends, jnp.minimum(jnp.arange(most), ends[-1] - 1)).astype(jnp.int32)
        whose = find(jnp.cumsum(sizes), jnp.arange(pairs))
        first = jnp.append((ends - tiles) * rows - (jnp.cumsum(sizes) - sizes), 0)[whose]
        places = jnp.where(whose < count, first + jnp.arange(pairs), most * rows).astype(jnp.int32)
        source = jnp.zeros(most * rows, jnp.int32).at[places].set(order // k, mode="drop")
        back = jnp.zeros(pairs, jnp.int32).at[order].set(places).reshape(chosen.shape)
        return cls(expert, ends[-1:], source, back)

    def summed(self, out: jax.Array, weights: jax.Array) -> jax.Array:
        """What the places became [N M, D], weighed by [T, k] and added up: [T, D]."""
        found = out.at[self.places].get(mode="fill", fill_value=0) * weights[..., None]
        return jnp.sum(found, axis=1).astype(out.dtype)


def tile_rows(pairs: int, count: int, fewest: int, most: int) -> int:
    """Rows of a tile: a power of two, about as many as each of `count` experts has of so many pairs."""
    rows = fewest
    while rows < min(most, pairs // count):
        rows *= 2
    return rows
