"""D-PACE (arXiv 2605.18810): cross-entropy whose weights follow what the drafter is sure of, block by block."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm
from dspark_jax.training.losses.ce import CrossEntropy


class DPace(VocabTerm):
    """-w_j log p_draft(label), where w_j = sum over k >= j of c_1 .. c_k.

    A position's c is (1 - smoothing) p_draft(label) + smoothing. The weights are constants: position j counts as much
    as the expected length that it takes part in, so they move towards later positions as the earlier ones are learned.
    They take the place of `loss.decay`, which this term does not look at. What it is divided by differs in the field:
    by the number of blocks, as its author has it (`loss.per_row`), or of supervised positions, as speculators does (a
    very large `loss.decay`).
    """

    weighted: ClassVar[bool] = False
    blockwise: ClassVar[bool] = True
    smoothing: ClassVar[float] = 0.5
    """The paper's alpha: how much a position counts after one that the drafter has no idea of."""

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        return self._weights(rows) * CrossEntropy().value(rows)

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`."""
        return CrossEntropy().slope(rows, scale * self._weights(rows)[..., None])

    def _weights(self, rows: Distributions) -> jax.Array:
        """[.., m]; rows that are not supervised have none, and take no part in the products."""
        blocks = (*rows.weights.shape[:-1], -1, rows.block)
        supervised = (rows.weights > 0).reshape(blocks)
        chosen = jnp.exp(-CrossEntropy().value(rows)).reshape(blocks)
        sure = jnp.where(supervised, (1.0 - self.smoothing) * chosen + self.smoothing, 1.0)
        survival = jnp.where(supervised, jnp.cumprod(sure, axis=-1), 0.0)
        weights = jnp.cumsum(survival[..., ::-1], axis=-1)[..., ::-1]
        return jax.lax.stop_gradient(jnp.where(supervised, weights, 0.0)).reshape(rows.weights.shape)
