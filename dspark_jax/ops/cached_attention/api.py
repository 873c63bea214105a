"""Contract and dispatch of `cached_attention`."""

from typing import Any

import jax

from dspark_jax.ops.cached_attention.rows import Rows
from dspark_jax.ops.dispatch import Operation

OPERATION = Operation(
    "cached_attention",
    {"cpu": ["xla"], "gpu": ["pallas_gpu", "xla"], "tpu": ["pallas_tpu", "xla"]},
    others=["reference"],
)


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: Rows,
    *,
    layer: jax.Array | int | None = None,
    scale: float,
    window: int = 0,
    front: int = 0,
    causal: bool = True,
    finite: bool = False,
    sinks: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped-query attention of a ragged block of flat query rows per request against its cache.

    Row i of request b is at p = rows.positions[b] + i. It sees the cache rows 0..p of its request (verification),
    or, without `causal`, all rows up to its request's last one (a drafter's block). Its own keys and values must be in
    the cache already. Cache rows that nobody sees may hold anything, even NaN.

    With a window the cache may be a ring of R = C - 2 front + 1 rows, with `front` rows that nobody sees before it and
    front - 1 after it: position p is in row front + p mod R. R is at least window + W - 1, so that no row of a
    block has taken the place of one that another row of it sees.

    Args:
      query: [T, N, H], with positional rotation applied; N is a multiple of K, and query head n reads key head
        n // (N / K).
      key: [B, K, C, H], heads before rows; or [L, B, K, C, H], a stack of layers' caches.
      value: likewise.
      rows: which flat rows belong to which request, and where they are; positions + counts <= C but for a ring.
      layer: which one of a stack is meant; None: key and value are no stacks.
      scale: factor of the scores.
      window: cache rows that a row sees at most, the last ones of all that it would see otherwise: its own included,
        and without `causal` its request's last one; 0 is all.
      front: rows before a ring; 0 = position p is in row p.
      causal: whether a row sees no later row of its own block.
      finite: promise that the whole cache is finite, which saves clearing what nobody sees.
      sinks: [N] a score of each query head that takes its share of the softmax and gives nothing; None: there are none.
      implementation: None (the best one here), 'xla', 'pallas_gpu' and 'pallas_tpu' (which read little that nobody
        sees) or 'reference' (the definition).

    Returns:
      [T, N, H] in the query's type; zeros in rows that belong to nobody. Scores and softmax are float32.

    Raises:
      ValueError: shapes do not fit together, or the implementation is unknown.
    """
    t, n, h = query.shape
    b, k, c = key.shape[-4:-1]
    if key.shape[-4:] != (b, k, c, h) or key.ndim != (4 if layer is None else 5) or value.shape != key.shape:
        raise ValueError(f"cached_attention: key {key.shape} and value {value.shape} do not fit query {query.shape}")
    if n % k:
        raise ValueError(f"cached_attention: {n} query heads are no multiple of {k} key heads")
    if rows.owner.shape != (t,) or rows.counts.shape != (b,):
        raise ValueError(
            f"cached_attention: rows are for {rows.owner.shape} queries of {rows.counts.shape} requests, here are "
            f"{(t,)} of {(b,)}"
        )
    if window < 0:
        raise ValueError(f"cached_attention: window={window} must be 0 or more")
    if front and (not window or c - 2 * front + 1 < window + rows.most - 1):
        raise ValueError(
            f"cached_attention: a ring after front={front} of {c} rows has no room for window={window} and blocks of "
            f"{rows.most}"
        )
    if sinks is not None and sinks.shape != (n,):
        raise ValueError(f"cached_attention: sinks {sinks.shape} are not one for each head of query {query.shape}")
    settings: dict[str, Any] = {
        "layer": layer,
        "scale": scale,
        "window": window,
        "front": front,
        "causal": causal,
        "finite": finite,
    }
    settings["sinks"] = sinks
    return OPERATION(implementation, query, key, value, rows, **settings)
