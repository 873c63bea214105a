"""Negative log acceptance: the total variation's gradient, made larger where next to nothing is accepted."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm

LEAST = 1e-5
"""Acceptance below which the term is constant, as in speculators."""


class NegativeLogAcceptance(VocabTerm):
    """-log(the probability that a token drawn from the draft is accepted).

    The acceptance is sum_v min(p_draft, p_target) here: as 1 - half the distance, a small one would have no digits.
    """

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        return -jnp.log(jnp.maximum(_overlap(rows), LEAST))

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`: p (sum_u p_u s_u - s) / acceptance, where s is 1 if p is below the target's."""
        draft, accept = rows.draft * rows.draft_scale, _overlap(rows)[..., None]
        below = 0.5 - 0.5 * jnp.sign(rows.difference)
        pull = jnp.where(accept > LEAST, scale / jnp.maximum(accept, LEAST), 0.0)
        return pull * draft * (jnp.sum(draft * below, axis=-1, keepdims=True) - below)


def _overlap(rows: Distributions) -> jax.Array:
    return jnp.sum(jnp.minimum(rows.draft * rows.draft_scale, rows.teacher * rows.teacher_scale), axis=-1)
