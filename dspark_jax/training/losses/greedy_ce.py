"""Cross-entropy with the target's likeliest token: what speculators calls ce."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm


class GreedyCrossEntropy(VocabTerm):
    """-log p_draft(argmax of p_target); `ce` has the data's token in its place."""

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        return -jnp.sum(jnp.where(_likeliest(rows), rows.log_draft, 0.0), axis=-1)

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`: p - [v = the target's likeliest]."""
        return rows.draft * (scale * rows.draft_scale) - jnp.where(_likeliest(rows), scale, 0.0)


def _likeliest(rows: Distributions) -> jax.Array:
    """[.., m, V] bool, true at one token of each row."""
    return jnp.arange(rows.logits.shape[-1]) == jnp.argmax(rows.teacher_logits, axis=-1)[..., None]
