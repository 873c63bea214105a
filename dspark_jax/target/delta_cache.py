"""What layers of linear attention keep of earlier rows: a state, and the rows that can still be taken back."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.target.cache import StateCache
from dspark_jax.target.families.family import DeltaShape

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaCache(StateCache):
    """States of a stack of layers, and rows that are not in them yet.

    Attributes:
      state: [L, B, K, R, H, W] float32, after the rows before `at`.
      rows: [L, B, taps - 1 + P, K, M] projections before the convolution, from position at - (taps - 1) on; zeros where
        that is below 0.
      decay: [L, B, P, K, R] float32, of the rows from `at` on.
      rate: likewise.
      at: [L, B] int32.
    """

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "state": ("batch", "heads", None, None, None),
        "rows": ("batch", None, "heads", None),
        "decay": ("batch", None, "heads", None),
        "rate": ("batch", None, "heads", None),
        "at": ("batch",),
    }

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
        return cls.empty(layers, sizes, separate=separate)
