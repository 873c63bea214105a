"""The definition of `attention`: one dense mask, one softmax."""

import jax
import jax.numpy as jnp


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    limit: jax.Array | None,
    starts: jax.Array | None,
    *,
    scale: float,
    window: int,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """See `api.attention`. Holds all scores [B, N, T, S], and keys and values of every query head."""
    (_, t, n, _), (_, s, k, _) = query.shape, key.shape
    limit = jnp.arange(t)[None] + 1 if limit is None else limit
    first = jnp.zeros_like(limit) if starts is None else starts
    if window:
        first = jnp.maximum(first, limit - window)
    row = jnp.arange(s)
    seen = (row >= first[..., None]) & (row < limit[..., None])  # [B, T, S]
    key, value = (x.repeat(n // k, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32, precision="highest") * scale
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sink.astype(jnp.float32)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :s]
    return jnp.einsum("bnts,bsnh->btnh", weights, value.astype(jnp.float32), precision="highest").astype(query.dtype)
