"""What is missing of a block's expected accepted length; beyond the paper."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss import Distributions, VocabTerm


class Length(VocabTerm):
    """1 - a_1 .. a_k on the supervised row k of a block, where a is 0 on rows that are not supervised.

    Summed over a block that is how far its expected accepted length is from the longest possible. The sizes of the
    weights do not matter to it.
    """

    weighted: ClassVar[bool] = False
    blockwise: ClassVar[bool] = True

    def value(self, rows: Distributions) -> jax.Array:
        """See `VocabTerm.value`."""
        survival = jnp.cumprod(_accept(rows), axis=-1).reshape(rows.weights.shape)
        return jnp.where(rows.weights > 0, 1.0 - survival, 0.0)

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """See `VocabTerm.slope`; `scale` is the same on all rows of a block."""
        return rows.distance_slope(scale * _length_slope(_accept(rows), rows.weights)[..., None])


def _accept(rows: Distributions) -> jax.Array:
    """Acceptance [.., m/G, G] by block, 0 where the weight is."""
    accept = jnp.where(rows.weights > 0, rows.accept, 0.0)
    return accept.reshape(*accept.shape[:-1], -1, rows.block)


def _length_slope(accept: jax.Array, weights: jax.Array) -> jax.Array:
    """d(minus the expected length) / d L1 of every row: accept [.., n, G] -> [.., n G], 0 where the weight is.

    d(sum_k a_1 .. a_k) / d a_j = a_1 .. a_{j-1} (1 + a_{j+1} + a_{j+1} a_{j+2} + ...), and d a / d L1 = -1/2; without
    divisions, as an acceptance may be 0.
    """
    size = accept.shape[-1]
    before, after = [jnp.ones_like(accept[..., 0])], [jnp.ones_like(accept[..., 0])]
    for j in range(size - 1):
        before.append(before[-1] * accept[..., j])
        after.append(1.0 + accept[..., size - 1 - j] * after[-1])
    slope = 0.5 * jnp.stack(before, axis=-1) * jnp.stack(after[::-1], axis=-1)
    return jnp.where(weights > 0, slope.reshape(weights.shape), 0.0)
