"""Jensen-Shannon divergence of draft and target: symmetric, and at most log 2."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm


class JensenShannon(VocabTerm):
    """The mean of KL(target || m) and KL(draft || m), where m is the mean of both."""

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        middle = _log_middle(rows)
        target = jnp.sum(rows.teacher * (rows.log_teacher - middle), axis=-1) * rows.teacher_scale[..., 0]
        draft = jnp.sum(rows.draft * (rows.log_draft - middle), axis=-1) * rows.draft_scale[..., 0]
        return 0.5 * (target + draft)

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`: half of p_draft (log(p_draft / m) - its mean); what m itself does cancels."""
        draft, ratio = rows.draft * rows.draft_scale, rows.log_draft - _log_middle(rows)
        return 0.5 * scale * draft * (ratio - jnp.sum(draft * ratio, axis=-1, keepdims=True))


def _log_middle(rows: Distributions) -> jax.Array:
    """log((p_draft + p_target) / 2), [.., m, V]."""
    return jnp.logaddexp(rows.log_draft, rows.log_teacher) - jnp.log(2.0)
