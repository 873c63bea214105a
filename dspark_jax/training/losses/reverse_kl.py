"""Divergence of the target's distribution from the draft's, which seeks one mode of it: rkl of speculators."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm


class ReverseKL(VocabTerm):
    """sum_v p_draft log(p_draft / p_target)."""

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        return jnp.sum(rows.draft * (rows.log_draft - rows.log_teacher), axis=-1) * rows.draft_scale[..., 0]

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`: p_draft (log(p_draft / p_target) - its mean)."""
        return (
            rows.draft * (scale * rows.draft_scale) * (rows.log_draft - rows.log_teacher - self.value(rows)[..., None])
        )
