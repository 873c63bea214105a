"""The hybrid LK loss (arXiv 2602.23881): KL where little is accepted, total variation where much is."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm
from dspark_jax.training.losses.kl import KL

ETA = 3.0
"""How soon the total variation takes over: the paper's."""


class HybridLK(VocabTerm):
    """s KL(target || draft) + (1 - s) TV, where s = exp(-3 acceptance) is a constant of the row."""

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        share = _share_of_kl(rows)
        return share * KL().value(rows) + (1.0 - share) * 0.5 * rows.distance

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`."""
        share = _share_of_kl(rows)[..., None]
        return KL().slope(rows, scale * share) + rows.distance_slope(0.5 * scale * (1.0 - share))


def _share_of_kl(rows: Distributions) -> jax.Array:
    return jax.lax.stop_gradient(jnp.exp(-ETA * rows.accept))
