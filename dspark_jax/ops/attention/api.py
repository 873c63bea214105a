"""Contract and dispatch of `attention`."""

import jax

from dspark_jax.ops.dispatch import Operation

OPERATION = Operation(
    "attention",
    {"cpu": ["xla"], "gpu": ["cudnn", "pallas_gpu", "xla"], "tpu": ["pallas_tpu", "xla"]},
    others=["reference"],
)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    window: int = 0,
    limit: jax.Array | None = None,
    starts: jax.Array | None = None,
    sinks: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped-query attention: row t of request b sees the keys starts[b, t]..limit[b, t]-1, or the last of them.

    Args:
      query: [B, T, N, H], with positional rotation applied; N is a multiple of K, and query head n reads key head
        n // (N / K).
      key: [B, S, K, H], finite.
      value: [B, S, K, H], finite.
      scale: factor of the scores.
      window: keys that a row sees at most, the last ones before its limit; 0 is all.
      limit: [B, T] in 1..S; None is t + 1, row t sees the rows up to itself (S = T).
      starts: [B, T] below `limit`, e.g. the first row of a document; None is 0 everywhere.
      sinks: [N] a score of each query head that takes its share of the softmax and gives nothing; None: there are none.
      implementation: None (the best one here), 'xla' (bounded memory), 'cudnn' (on NVIDIA GPUs; without `limit` and
        `sinks`), 'pallas_gpu', 'pallas_tpu' or 'reference' (the definition).

    Returns:
      [B, T, N, H] in the query's type; scores and softmax are float32.

    Raises:
      ValueError: shapes do not fit together, or the implementation is unknown.
    """
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    if key.shape != (b, s, k, h) or value.shape != key.shape:
        raise ValueError(f"attention: key {key.shape} and value {value.shape} do not fit query {query.shape}")
    if n % k:
        raise ValueError(f"attention: {n} query heads are no multiple of {k} key heads")
    if limit is None and s != t:
        raise ValueError(f"attention: {t} rows and {s} keys need a limit")
    for name, rows in (("limit", limit), ("starts", starts)):
        if rows is not None and rows.shape != (b, t):
            raise ValueError(f"attention: {name} is {rows.shape}, with query {query.shape} it must be {(b, t)}")
    if sinks is not None and sinks.shape != (n,):
        raise ValueError(f"attention: sinks is {sinks.shape}, with query {query.shape} it must be {(n,)}")
    return OPERATION(implementation, query, key, value, limit, starts, scale=scale, window=window, sinks=sinks)
