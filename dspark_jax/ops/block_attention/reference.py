"""The definition of `block_attention`: one dense mask, one softmax."""

import jax
import jax.numpy as jnp


def block_attention(
    query: jax.Array,
    context_key: jax.Array,
    context_value: jax.Array,
    block_key: jax.Array,
    block_value: jax.Array,
    anchors: jax.Array,
    keep: jax.Array,
    starts: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """See `api.block_attention`. Holds all scores [B, N, A*G, S + A*E] at once, and no input may be NaN."""
    b, a, g, n, h = query.shape
    s, k = context_key.shape[1:3]
    e = block_key.shape[2]
    key = jnp.concatenate([context_key, block_key.reshape(b, a * e, k, h)], axis=1).repeat(n // k, axis=2)
    value = jnp.concatenate([context_value, block_value.reshape(b, a * e, k, h)], axis=1).repeat(n // k, axis=2)
    block = jnp.arange(a * g) // g
    row = jnp.arange(s)
    before_anchor = (row >= starts[:, block, None]) & (row < anchors[:, block, None])  # [B, A*G, S]
    same_block = jnp.broadcast_to(block[:, None] == jnp.arange(a * e) // e, (b, a * g, a * e))
    visible = jnp.concatenate([before_anchor, same_block], axis=-1)  # [B, A*G, S + A*E]
    scores = jnp.einsum(
        "btnh,bsnh->bnts", query.reshape(b, a * g, n, h), key, preferred_element_type=jnp.float32, precision="highest"
    )
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores * scale, -jnp.inf), axis=-1)
    out = jnp.einsum("bnts,bsnh->btnh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    out = jnp.where(keep[..., None, None, None], out.reshape(query.shape), 0.0)
    return out.astype(query.dtype)
