"""What layers of linear attention keep of earlier rows: a state, and the rows that can still be taken back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.sharding import constrain
from dspark_jax.target.cache import LayerCache
from dspark_jax.target.families.family import DeltaShape
from dspark_jax.target.layers import layer_at

# One request, drawn: passes of up to P = 4 rows, a convolution of 3 taps. Positions 0..6 are in the state. The last
# pass had the rows a, b, c, d at 7..10, which the state does not know:
#
#     at        7                      the first position that is not in the state
#     rows      5  6 | a  b  c  d      what the convolution reads at 7 and after it; and what enters the state
#
# The next pass begins at 9: a and b count, c and d are taken back. It puts a and b into the state, together with which
# its own rows w, x, y, z are computed, and leaves
#
#     at        9
#     rows      a  b | w  x  y  z
#
# So one state per layer is read once and written once in a pass, however many rows are taken back. To keep the states
# after each row of a pass instead takes P states where this takes P rows: at the shape of Qwen3.5-4B 2 MiB each instead
# of 16 KiB (in bfloat16).


AXES = {
    "state": ("batch", "heads", None, None, None),
    "rows": ("batch", None, "heads", None),
    "decay": ("batch", None, "heads", None),
    "rate": ("batch", None, "heads", None),
    "at": ("batch",),
}
"""Logical axes of a layer's arrays."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaCache(LayerCache):
    """States of a stack of layers, and rows that are not in them yet.

    Every field is one array for the stack, as given here, or a tuple of one array per layer, which only lists of layers
    can read (see `decode_weights`).

    Attributes:
      state: [L, B, K, R, H, W] float32, after the rows before `at`.
      rows: [L, B, taps - 1 + P, K, M] projections before the convolution, from position at - (taps - 1) on; zeros where
        that is below 0.
      decay: [L, B, P, K, R] float32, of the rows from `at` on.
      rate: likewise.
      at: [L, B] int32.
    """

    state: Any
    rows: Any
    decay: Any
    rate: Any
    at: Any

    @classmethod
    def zeros(
        cls, layers: int, batch: int, block: int, shape: DeltaShape, dtype: Any, *, separate: bool = False
    ) -> "DeltaCache":
        """An empty cache for passes of which up to P = `block` rows may be taken back, and for texts of any length."""
        rates = (batch, block, shape.heads, shape.values)
        sizes = {
            "state": ((batch, shape.heads, shape.values, shape.width, shape.value_width), jnp.float32),
            "rows": ((batch, shape.taps - 1 + block, shape.heads, sum(shape.pieces)), dtype),
            "decay": (rates, jnp.float32),
            "rate": (rates, jnp.float32),
            "at": ((batch,), jnp.int32),
        }

        def empty(size: tuple[int, ...], dtype: Any) -> Any:
            if separate:
                return tuple(jnp.zeros(size, dtype) for _ in range(layers))
            return jnp.zeros((layers, *size), dtype)

        return cls(**{name: empty(*how) for name, how in sizes.items()}).on_mesh()

    def on_mesh(self, pin: Callable[..., Any] = constrain) -> "DeltaCache":
        """See `LayerCache`."""

        def one(leaf: Any, axes: tuple[str | None, ...]) -> Any:
            return tuple(pin(x, *axes) for x in leaf) if isinstance(leaf, tuple) else pin(leaf, None, *axes)

        return DeltaCache(**{name: one(getattr(self, name), axes) for name, axes in AXES.items()})

    def layer(self, index: jax.Array | int) -> tuple[jax.Array, ...]:
        """The arrays of one layer, in the order of `AXES`."""
        return tuple(
            leaf[index] if isinstance(leaf, tuple) and isinstance(index, int) else layer_at(leaf, index)
            for leaf in (getattr(self, name) for name in AXES)
        )

    def put(self, index: jax.Array | int, arrays: Sequence[jax.Array]) -> "DeltaCache":
        """The cache with these arrays of one layer."""

        def one(leaf: Any, array: jax.Array) -> Any:
            if isinstance(leaf, tuple):
                assert isinstance(index, int), "separate caches are for lists of layers"
                return (*leaf[:index], array, *leaf[index + 1 :])
            return jax.lax.dynamic_update_index_in_dim(leaf, array, index, 0)

        return DeltaCache(*(one(getattr(self, name), array) for name, array in zip(AXES, arrays, strict=True)))
