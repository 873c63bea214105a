"""Cross-entropy with the data."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm


class CrossEntropy(VocabTerm):
    """-log p_draft(label)."""

    in_kernels: ClassVar[bool] = True
    reported: ClassVar[bool] = True

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        return (rows.top + jnp.log(rows.draft_sum))[..., 0] - rows.label_logit

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`: p - [v = label]."""
        return rows.draft * (scale * rows.draft_scale) - jnp.where(rows.is_label, scale, 0.0)
