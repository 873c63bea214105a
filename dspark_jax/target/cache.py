"""What a layer stack, of a target or a drafter, keeps of earlier rows: in most cases their keys and values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from dspark_jax import platform
from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.cache_write import cache_write
from dspark_jax.ops.cached_attention import Rows
from dspark_jax.sharding import constrain
from dspark_jax.target.families.family import AttentionShape
from dspark_jax.target.layers import drafter_layer, layer_at

# A ring, drawn: window 6, passes of up to 3 rows (front = 3), so C = 16 and R = 11. Position p is in row 3 + p mod 11.
#
#                  before  |           the ring               | after
#     row          0  1  2 |  3  4  5  6  7  8  9 10 11 12 13 | 14 15
#     0..9 written .  .  . |  0  1  2  3  4  5  6  7  8  9  . |  .  .
#
# A round writes positions 10, 11 and 12. Row 13 is the last of the ring, so they are written twice, in one piece each:
#
#     from row 13          |                               10 | 11 12
#     from row 2        10 | 11 12                            |
#     row          0  1  2 |  3  4  5  6  7  8  9 10 11 12 13 | 14 15
#     then         .  . 10 | 11 12  2  3  4  5  6  7  8  9 10 | 11 12
#
# Row 2 and rows 14 and 15 are outside the ring: nobody sees them. Positions 0 and 1 have lost their rows. The earliest
# query from now on is at 11 (if both drafts are rejected) and sees 6..11, so they were not needed any more.


class LayerCache:
    """What a stack of layers of one kind keeps of the rows that it has seen: a tree of arrays, each with the requests.

    Which of its rows count is said by the position at which the next pass begins: going back costs nothing. A cache for
    passes of W rows of which some may be taken back can go back by W rows.
    """

    def on_mesh(self, pin: Callable[..., Any] = constrain) -> Any:
        """The cache with requests, and heads, split over the mesh.

        `pin(array, *logical axes)` does it: pins in a program, or lays out a shape.
        """
        raise NotImplementedError


class StateCache(LayerCache):
    """A dataclass of arrays, one for the stack in each field, or a tuple of one array per layer, which only lists of
    layers can read (see `decode_weights`); None in a field that these layers do not need.

    Attributes:
      AXES: field -> logical axes of a layer's array.
    """

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]]

    @classmethod
    def empty(cls, layers: int, sizes: Mapping[str, tuple[tuple[int, ...], Any]], *, separate: bool) -> Self:
        """Zeros: field -> shape of a layer's array, and its type. Fields that are not there are None."""

        def zeros(size: tuple[int, ...], dtype: Any) -> Any:
            if separate:
                return tuple(jnp.zeros(size, dtype) for _ in range(layers))
            return jnp.zeros((layers, *size), dtype)

        made = {name: zeros(*sizes[name]) if name in sizes else None for name in cls.AXES}
        return cls(**made).on_mesh()

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that there are."""
        return {name: getattr(self, name) for name in self.AXES if getattr(self, name) is not None}

    @property
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """Logical axes of a layer's arrays, in their order."""
        return tuple(self.AXES[name] for name in self.fields)

    def on_mesh(self, pin: Callable[..., Any] = constrain) -> Self:
        """See `LayerCache`."""

        def one(leaf: Any, axes: tuple[str | None, ...]) -> Any:
            return tuple(pin(x, *axes) for x in leaf) if isinstance(leaf, tuple) else pin(leaf, None, *axes)

        return self._with({name: one(leaf, self.AXES[name]) for name, leaf in self.fields.items()})

    def layer(self, index: jax.Array | int) -> tuple[jax.Array, ...]:
        """The arrays of one layer."""
        return tuple(
            leaf[index] if isinstance(leaf, tuple) and isinstance(index, int) else layer_at(leaf, index)
            for leaf in self.fields.values()
        )

    def put(self, index: jax.Array | int, arrays: Sequence[jax.Array]) -> Self:
        """The cache with these arrays of one layer."""

        def one(leaf: Any, array: jax.Array) -> Any:
            if isinstance(leaf, tuple):
                assert isinstance(index, int), "separate caches are for lists of layers"
                return (*leaf[:index], array, *leaf[index + 1 :])
            return jax.lax.dynamic_update_index_in_dim(leaf, array, index, 0)

        return self._with(
            {name: one(leaf, array) for (name, leaf), array in zip(self.fields.items(), arrays, strict=True)}
        )

    def _with(self, fields: Mapping[str, Any]) -> Self:
        return type(self)(**{name: fields.get(name) for name in self.AXES})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(LayerCache):
    """Keys and values of a layer stack.

    Row p of a request is written when position p is processed and read only by queries at positions >= p, so rolling
    back needs no copy: stale rows are overwritten before any query can see them.

    The cache of layers with a window is a ring of R rows: position p is in row front + p mod R. R is so large that
    what the rows of a pass overwrite, those that are taken back as well, lies in front of every later query's window.
    Before the ring and after it are rows that nobody sees: a few rows are written at once as they are, in two
    places where they cross the seam, since in place a TPU writes only what is in one piece.

    Attributes:
      keys: [L, B, K, C, H], heads before rows, as the products of attention want them; or one array per layer, which
        only lists of layers can read (see `decode_weights`).
      values: likewise.
      front: static: rows in front of a ring, the most that `write` takes; C = front + R + front - 1. 0 = no ring.
    """

    keys: Any
    values: Any
    front: int = dataclasses.field(default=0, metadata={"static": True})

    @classmethod
    def zeros(
        cls,
        layers: int,
        batch: int,
        length: int,
        arch: TargetArchitecture,
        dtype: Any,
        attention: AttentionShape | None = None,
        *,
        separate: bool = False,
        block: int = 0,
    ) -> "KVCache":
        """An empty cache for at least `length` positions of a stack of one kind of layers.

        `attention` says what the layers' is like; None: those of a drafter for a target of shape `arch`. `separate`
        gives each layer an array. With `block`, layers with a window have a ring that takes so many rows at once,
        unless that is not smaller.
        """
        attention = attention or drafter_layer(arch)[1].attention
        ring = ring_rows(attention.window, block) if block and attention.window else length
        length, front = (ring, block) if ring < length else (platform.cache_rows(length), 0)
        shape = (batch, attention.kv_heads, length, attention.width)
        if separate:
            keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for _ in range(2))
            return cls(keys, values, front).on_mesh()
        return cls(jnp.zeros((layers, *shape), dtype), jnp.zeros((layers, *shape), dtype), front).on_mesh()

    def on_mesh(self, pin: Callable[..., Any] = constrain) -> "KVCache":
        """See `LayerCache`."""
        axes = ("batch", "kv_heads", None, None)
        stacked = not isinstance(self.keys, tuple)
        return jax.tree.map(lambda rows: pin(rows, *((None, *axes) if stacked else axes)), self)

    def write(self, index: jax.Array | int, keys: jax.Array, values: jax.Array, starts: jax.Array) -> "KVCache":
        """Puts rows [B, T, K, H] of layer `index` at positions starts[b]..starts[b]+T-1.

        The caller leaves room for T rows; a ring takes `front` of them at most.
        """
        places = starts[None]
        if self.front:
            assert keys.shape[1] <= self.front, "more rows go in by `write_last`"
            at = starts % self.ring
            seam = at + keys.shape[1] > self.ring
            places = jnp.stack([self.front + at, jnp.where(seam, self.front + at - self.ring, -1)])
        new_keys, new_values = (rows.astype(self.dtype).swapaxes(1, 2) for rows in (keys, values))  # [B, K, T, H]
        if isinstance(self.keys, tuple):
            assert isinstance(index, int), "separate caches are for lists of layers"
            stacks = self.keys, self.values
            one = cache_write(self.keys[index][None], self.values[index][None], new_keys, new_values, places, layer=0)
            both = [(*stack[:index], x[0], *stack[index + 1 :]) for stack, x in zip(stacks, one, strict=True)]
        else:
            both = cache_write(self.keys, self.values, new_keys, new_values, places, layer=index)
        return dataclasses.replace(self, keys=both[0], values=both[1])

    def write_rows(self, index: jax.Array | int, keys: jax.Array, values: jax.Array, rows: Rows) -> "KVCache":
        """Puts flat rows [T, K, H] of layer `index` where `rows` says; those that belong to nobody are dropped."""
        at = self.front + rows.at % self.ring if self.front else rows.at

        def put(cache: Any, flat: jax.Array) -> Any:
            # Head by head: of pieces [K, H] a TPU would transpose the whole cache before it and back again.
            where = (rows.owner[:, None], jnp.arange(flat.shape[1]), at[:, None])
            return _changed(
                cache, index, lambda stack, number: stack.at[(number, *where)].set(flat.astype(self.dtype), mode="drop")
            )

        return dataclasses.replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def write_last(
        self, index: jax.Array | int, keys: jax.Array, values: jax.Array, starts: jax.Array, counts: jax.Array
    ) -> "KVCache":
        """Puts the last R of the first counts[b] rows [B, T, K, H], from position starts[b] on, into a ring."""
        last = (starts + counts - 1)[:, None]
        row = jnp.arange(self.length) - self.front
        at = last - (last - row) % self.ring - starts[:, None]  # [B, C] which of the T rows belongs in each ring row
        fresh = (at >= 0) & (row >= 0) & (row < self.ring)
        taken = jnp.clip(at, 0, keys.shape[1] - 1)[..., None, None]

        def put(cache: Any, rows: jax.Array) -> Any:
            rows = jnp.take_along_axis(rows.astype(self.dtype), taken, axis=1).swapaxes(1, 2)  # [B, K, C, H]

            def change(stack: jax.Array, number: jax.Array | int) -> jax.Array:
                one = jnp.where(fresh[:, None, :, None], rows, layer_at(stack, number))
                return jax.lax.dynamic_update_index_in_dim(stack, one, number, 0)

            return _changed(cache, index, change)

        return dataclasses.replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def before(self, index: jax.Array | int, starts: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, count, K, H] of the `count` positions before `starts` in a ring; below 0 anything."""
        at = self.front + (starts[:, None] - count + jnp.arange(count)) % self.ring
        keys, values = (jnp.take_along_axis(x, at[:, None, :, None], axis=2).swapaxes(1, 2) for x in self.stored(index))
        return keys, values

    @property
    def ring(self) -> int:
        """R."""
        return self.length - 2 * self.front + 1

    @property
    def length(self) -> int:
        """C."""
        return jax.tree.leaves(self.keys)[0].shape[-2]

    @property
    def dtype(self) -> Any:
        """Type of its rows."""
        return jax.tree.leaves(self.keys)[0].dtype

    def stored(self, index: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer as they are stored, [B, K, C, H]."""
        if isinstance(self.keys, tuple):
            assert isinstance(index, int), "separate caches are for lists of layers"
            return self.keys[index], self.values[index]
        return layer_at((self.keys, self.values), index)

    def for_attention(self, index: jax.Array | int) -> dict[str, Any]:
        """Keys and values of one layer as `cached_attention` takes them: of a stack whole, since a kernel reads it in
        place while a slice of it would be copied first."""
        if isinstance(self.keys, tuple):
            assert isinstance(index, int), "separate caches are for lists of layers"
            return {"key": self.keys[index], "value": self.values[index]}
        return {"key": self.keys, "value": self.values, "layer": index}

    def layer(self, index: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, C, K, H] of one layer."""
        keys, values = self.stored(index)
        return keys.swapaxes(1, 2), values.swapaxes(1, 2)


def _changed(cache: Any, index: jax.Array | int, change: Callable[[jax.Array, jax.Array | int], jax.Array]) -> Any:
    """Keys or values after `change` of layer `index`, which is given a stack of layers and the layer's number in it."""
    if isinstance(cache, tuple):
        assert isinstance(index, int), "separate caches are for lists of layers"
        return (*cache[:index], change(cache[index][None], 0)[0], *cache[index + 1 :])
    return change(cache, index)


def ring_rows(window: int, block: int) -> int:
    """C of a ring for a window of `window` rows, where passes write up to `block` rows, some of them for nothing.

    The earliest row that the first of these sees is window - 1 before it, the last one block - 1 after it;
    2 block - 1 rows are around the ring. Rounded up to a whole number of bfloat16 tiles (16 rows).
    """
    return -(-(window + block - 1 + 2 * block - 1) // 16) * 16
