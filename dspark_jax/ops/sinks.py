"""Softmax of attention whose heads may have sinks: scores that take their share and give nothing."""

import jax
import jax.numpy as jnp


def shares(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Float32 scores [..., S] -> the weight of every key; sinks [...] (or what broadcasts to it) are one more score."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks[..., None].astype(jnp.float32)
    # Its gradient is 0: what is subtracted of all scores changes no weight.
    highest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    parts = jnp.exp(scores - highest)
    return parts / (jnp.sum(parts, axis=-1, keepdims=True) + jnp.exp(sinks - highest))
