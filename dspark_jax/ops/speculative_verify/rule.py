"""The acceptance rule: draft x, drawn from p, is accepted with probability min(1, q(x) / p(x)); after a rejection the
next token comes from the residual (q - p)+ (paper section 2.1; trap 24)."""

import jax
import jax.numpy as jnp

FLOOR = 1e-8
"""Smallest residual mass that is divided by."""


def acceptance_probabilities(draft: jax.Array, target: jax.Array) -> jax.Array:
    """min(1, q(x) / p(x)) of the drafted tokens, from their probabilities under drafter and target, of any shape.

    No floor but float32's own: of a large vocabulary much mass is in tokens of less than 1e-8 each.
    """
    return jnp.minimum(1.0, target / jnp.maximum(draft, jnp.finfo(jnp.float32).tiny))


def residual(target: jax.Array, draft: jax.Array) -> jax.Array:
    """Distribution [..., V] of the correction after a rejection: (q - p)+ normalised, or q where nothing is left."""
    surplus = jnp.maximum(target - draft, 0.0)
    mass = jnp.sum(surplus, axis=-1, keepdims=True)
    return jnp.where(mass <= FLOOR, target, surplus / jnp.maximum(mass, FLOOR))


def accepted_prefix(agree: jax.Array, lengths: jax.Array) -> jax.Array:
    """Length [B] of the agreeing prefix of agree [B, G], at most `lengths` [B]."""
    agree &= jnp.arange(agree.shape[1]) < lengths[:, None]
    return jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1)
