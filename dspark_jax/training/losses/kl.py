"""Divergence of the draft from the target's distribution: what speculators calls kl_div."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm


class KL(VocabTerm):
    """sum_v p_target log(p_target / p_draft): `soft_ce` less the target's entropy, with the same gradient.

    So 0 is the best that there is, whatever the target is unsure of.
    """

    in_kernels: ClassVar[bool] = True

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        return jnp.sum(rows.teacher * (rows.log_teacher - rows.log_draft), axis=-1) * rows.teacher_scale[..., 0]

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`: p_draft - p_target."""
        return scale * rows.difference
