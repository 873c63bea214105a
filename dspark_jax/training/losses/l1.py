"""Distance to the target's distribution."""

from typing import ClassVar

import jax

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm


class Distance(VocabTerm):
    """sum_v |p_draft - p_target|, without the half of the total variation."""

    in_kernels: ClassVar[bool] = True
    reported: ClassVar[bool] = True

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        return rows.distance

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`."""
        return rows.distance_slope(scale)
