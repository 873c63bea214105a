"""Top-k, top-p and min-p as masks over a vocabulary, found by bisection instead of a sort.

The border of a top set is found in about thirty passes of compare and sum. Top-k of 256 rows of 4096 tokens on two CPU
cores: 30 ms, a sort 160 ms. Equal logits are ordered by token id, so that every mask is determined.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def leading(distance: jax.Array, weights: jax.Array | float, target: jax.Array) -> jax.Array:
    """Entries in front of which, by rising (distance, index), there is less than `target` weight.

    With weights 1 that is exactly the `target` nearest entries; with probabilities it is the smallest nearest set of
    at least that mass.

    Args:
      distance: [..., V] float32, not negative.
      weights: [..., V] float32, or one for all; not negative.
      target: [...] positive.

    Returns:
      Mask [..., V]; never empty.
    """
    keys = jax.lax.bitcast_convert_type(distance, jnp.int32)  # floats from 0 up are ordered as their bits are
    index = jnp.arange(distance.shape[-1])

    def mass(mask: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, weights, 0.0), axis=-1)

    border = _smallest(lambda key: mass(keys <= key[..., None]) >= target, jnp.min(keys, -1), jnp.max(keys, -1))
    inside, tied = keys < border[..., None], keys == border[..., None]
    left = target - mass(inside)
    ends = jnp.min(jnp.where(tied, index, index[-1]), axis=-1), jnp.max(jnp.where(tied, index, 0), axis=-1)
    last = _smallest(lambda end: mass(tied & (index <= end[..., None])) >= left, *ends)
    return inside | (tied & (index <= last[..., None]))


def _smallest(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """Smallest integer in low..high at which a predicate that stays true holds; `high` where it holds at none."""

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = holds(middle) | (low >= high)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    return jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low, high))[1]


def kept(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array | None,
    top_p: jax.Array | None,
    min_p: jax.Array | None,
) -> jax.Array:
    """Tokens that survive top-k, then top-p of what is left, then min-p: the order of Hugging Face's warpers.

    Args:
      logits: [..., V] float32.
      temperature: [...] positive.
      top_k: [...] int32, this many tokens stay (exactly: of equal logits the lower ids); 0 is off.
      top_p: [...] float32, the smallest set of at least this share stays; 1 is off.
      min_p: [...] float32, tokens of at least this share of the likeliest one's probability stay; 0 is off.

    Returns:
      Mask [..., V]. The first largest logit is always in it.
    """
    distance = (jnp.max(logits, axis=-1, keepdims=True) - logits) / temperature[..., None]
    weights = jnp.exp(-distance)  # probabilities over the likeliest one's
    mask = jnp.ones(logits.shape, bool)
    if top_k is not None:
        mask = leading(distance, 1.0, top_k.astype(jnp.float32)) | (top_k <= 0)[..., None]
    if top_p is not None:
        weights = jnp.where(mask, weights, 0.0)
        share = jnp.where(top_p < 1.0, top_p, 0.0)  # no search for a border that is not used
        nucleus = leading(distance, weights, share * jnp.sum(weights, axis=-1))
        mask &= nucleus | (top_p >= 1.0)[..., None]
    if min_p is not None:
        mask &= weights >= min_p[..., None]
    return mask
