"""`block_attention` in plain XLA: context and own block are scored separately, a bounded number of blocks at a time."""

import jax
import jax.numpy as jnp

_SCORES = 1 << 24
"""Context scores in memory at once, per sequence (64 MB in float32); larger problems go through in chunks of blocks."""

_MASKED = -1e30  # finite: a row of masked scores stays free of NaN, and exp(_MASKED - maximum) is exactly 0


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
    max_scores: int = _SCORES,
) -> jax.Array:
    """See `api.block_attention`. A single chunk keeps its weights for the backward pass, several recompute them."""
    b, a, g, n, _ = query.shape
    s = context_key.shape[1]
    # Rows that nothing sees have weight 0, but 0 * NaN is NaN, in values and in gradients: clear them first.
    seen = jnp.arange(s) < jnp.max(jnp.where(keep, anchors, 0), axis=1)[:, None]
    key, value = (
        jnp.where(seen[:, None, :, None], x.swapaxes(1, 2), 0) for x in (context_key, context_value)
    )  # [B, K, S, H]
    query, block_key, block_value = (
        jnp.where(keep[..., None, None, None], x, 0) for x in (query, block_key, block_value)
    )
    chunk = max(max_scores // (n * g * s), 1)
    count = -(-a // chunk)
    if count == 1:
        return _attend(query, key, value, block_key, block_value, anchors, keep, starts, scale)
    chunk = -(-a // count)

    def split(x: jax.Array) -> jax.Array:
        """[B, A, ...] -> [count, B, chunk, ...]; the blocks that fill up the last chunk are not kept."""
        x = jnp.pad(x, [(0, 0), (0, count * chunk - a)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(b, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def body(blocks: tuple[jax.Array, ...]) -> jax.Array:
        rows, rows_key, rows_value, at, kept, first = blocks
        return _attend(rows, key, value, rows_key, rows_value, at, kept, first, scale)

    out = jax.lax.map(body, tuple(map(split, (query, block_key, block_value, anchors, keep, starts))))
    return out.swapaxes(0, 1).reshape(b, count * chunk, *query.shape[2:])[:, :a]


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_key: jax.Array,
    block_value: jax.Array,
    anchors: jax.Array,
    keep: jax.Array,
    starts: jax.Array,
    scale: float,
) -> jax.Array:
    """All blocks at once. As the api, but with key and value [B, K, S, H]; nothing holds NaN."""
    b, a, g, n, h = query.shape
    k, s = key.shape[1:3]
    r = n // k  # query heads per key head: rows of the same product
    rows = query.reshape(b, a, g, k, r, h).transpose(0, 3, 1, 2, 4, 5)  # [B, K, A, G, R, H]
    own_key = block_key.transpose(0, 3, 1, 2, 4)  # [B, K, A, G, H]
    own_value = block_value.transpose(0, 3, 1, 2, 4)

    scores = _scores("bkmh,bksh->bkms", rows.reshape(b, k, a * g * r, h), key).reshape(b, k, a, g * r, s) * scale
    row = jnp.arange(s)
    visible = (row >= starts[..., None]) & (row < anchors[..., None])  # [B, A, S]
    scores = jnp.where(visible[:, None, :, None], scores, _MASKED)
    own_scores = _scores("bkamh,bkagh->bkamg", rows.reshape(b, k, a, g * r, h), own_key) * scale

    # One softmax over both parts. The own block is always visible, so the sum is at least exp(0) / something finite.
    top = jnp.maximum(jnp.max(scores, axis=-1), jnp.max(own_scores, axis=-1))[..., None]
    top = jax.lax.stop_gradient(top)
    weights, own_weights = jnp.exp(scores - top), jnp.exp(own_scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.sum(own_weights, axis=-1, keepdims=True)
    mixed = _scores("bkms,bksh->bkmh", weights.astype(value.dtype).reshape(b, k, a * g * r, s), value)
    own_mixed = _scores("bkamg,bkagh->bkamh", own_weights.astype(value.dtype), own_value)
    out = (mixed.reshape(b, k, a, g * r, h) + own_mixed) / total

    out = out.reshape(b, k, a, g, r, h).transpose(0, 2, 3, 1, 4, 5).reshape(b, a, g, n, h)
    return jnp.where(keep[..., None, None, None], out, 0.0).astype(query.dtype)


def _scores(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A batched product with float32 accumulation and result."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
