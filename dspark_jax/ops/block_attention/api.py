"""Contract and dispatch of `block_attention`."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.dispatch import Operation

OPERATION = Operation(
    "block_attention",
    {"cpu": ["xla"], "gpu": ["pallas_gpu", "xla"], "tpu": ["pallas_tpu", "xla"]},
    others=["reference"],
)


def block_attention(
    query: jax.Array,
    context_key: jax.Array,
    context_value: jax.Array,
    block_key: jax.Array,
    block_value: jax.Array,
    anchors: jax.Array,
    keep: jax.Array,
    starts: jax.Array | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped-query attention of A blocks of G rows over a shared context (paper 3.1; mask of trap 3).

    A block may have more (or fewer) keys than rows: E = G except in drafters that go row by row.

    Every row of block (b, a) attends to the context rows from `starts[b, a]` on that are strictly before
    `anchors[b, a]`, and to all E keys of its own block, in both directions; other blocks are invisible. A block with
    keep False gives zeros and passes no gradient. Context rows at and after the last kept anchor, and the arrays of
    blocks that are not kept, may hold anything, even NaN.

    Args:
      query: [B, A, G, N, H], with positional rotation applied; N is a multiple of K, and query head n reads key head
        n // (N / K).
      context_key: [B, S, K, H].
      context_value: [B, S, K, H].
      block_key: [B, A, E, K, H].
      block_value: [B, A, E, K, H].
      anchors: [B, A] int32 in 0..S.
      keep: [B, A] bool.
      starts: [B, A] int32, first row of the document that the anchor is in; None is 0 everywhere.
      scale: factor of the scores.
      implementation: None (the best one here), 'xla' (bounded memory), 'pallas_gpu' or 'pallas_tpu' (no array of scores
        at all) or 'reference' (the definition).

    Returns:
      [B, A, G, N, H] in the query's type; scores and softmax are float32. Differentiable in the first five arguments.

    Raises:
      ValueError: shapes or types do not fit together, or the implementation is unknown.
    """
    b, a, _, n, h = query.shape
    s, k = context_key.shape[1:3]
    e = block_key.shape[2]
    expected = {
        "context_key": (context_key, (b, s, k, h)),
        "context_value": (context_value, (b, s, k, h)),
        "block_key": (block_key, (b, a, e, k, h)),
        "block_value": (block_value, (b, a, e, k, h)),
        "anchors": (anchors, (b, a)),
        "keep": (keep, (b, a)),
    }
    if starts is not None:
        expected["starts"] = (starts, (b, a))
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"block_attention: {name} is {array.shape}, with query {query.shape} it must be {shape}")
    if n % k:
        raise ValueError(f"block_attention: {n} query heads are no multiple of {k} key heads")
    if keep.dtype != jnp.bool_ or not jnp.issubdtype(anchors.dtype, jnp.integer):
        raise ValueError(f"block_attention: anchors {anchors.dtype} must be integers and keep {keep.dtype} bool")
    starts = jnp.zeros_like(anchors) if starts is None else starts
    arrays = (query, context_key, context_value, block_key, block_value, anchors, keep, starts)
    return OPERATION(implementation, *map(jnp.asarray, arrays), scale=scale)
