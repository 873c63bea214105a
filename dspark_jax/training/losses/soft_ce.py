"""Cross-entropy with the target's distribution: EAGLE-3's loss."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm


class SoftCrossEntropy(VocabTerm):
    """-sum_v p_target log p_draft."""

    in_kernels: ClassVar[bool] = True

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        mean_logit = jnp.sum(rows.teacher * (rows.logits - rows.top), axis=-1) * rows.teacher_scale[..., 0]
        return jnp.log(rows.draft_sum)[..., 0] - mean_logit

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`: p_draft - p_target."""
        return scale * rows.difference
