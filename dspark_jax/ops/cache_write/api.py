"""Contract and dispatch of `cache_write`."""

import jax

from dspark_jax.ops.dispatch import Operation

OPERATION = Operation(
    "cache_write", {"cpu": ["xla"], "gpu": ["xla"], "tpu": ["pallas_tpu", "xla"]}, others=["reference"]
)


def cache_write(
    key: jax.Array,
    value: jax.Array,
    new_key: jax.Array,
    new_value: jax.Array,
    places: jax.Array,
    *,
    layer: jax.Array | int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Puts T successive rows of every request into the caches of one layer of a stack, in place where the caller gives
    the caches up.

    Args:
      key: [L, B, K, C, H] caches of a stack of layers, heads before rows.
      value: likewise.
      new_key: [B, K, T, H] in the caches' type, at most C rows.
      new_value: likewise.
      places: [P, B] int32: request b's rows go to rows places[p, b]..places[p, b]+T-1, P times. A negative place is
        none, but where there is one, the request's first T rows may come to hold anything. All others leave room: they
        are at most C - T.
      layer: of the stack.
      implementation: None (the best one here), 'xla', 'pallas_tpu' or 'reference' (the definition).

    Returns:
      The caches.

    Raises:
      ValueError: shapes do not fit together, or the implementation is unknown.
    """
    (_, b, k, c, h), t = key.shape, new_key.shape[2]
    if value.shape != key.shape or new_key.shape != (b, k, t, h) or new_value.shape != new_key.shape or t > c:
        shapes = [x.shape for x in (value, new_key, new_value)]
        raise ValueError(f"cache_write: value and new rows {shapes} do not fit key {key.shape}")
    if places.ndim != 2 or places.shape[1] != b:
        raise ValueError(f"cache_write: places {places.shape} are not those of {b} requests")
    return OPERATION(implementation, key, value, new_key, new_value, places, layer=layer)
