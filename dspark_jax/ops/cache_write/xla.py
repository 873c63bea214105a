"""`cache_write` in plain XLA: a piece of all heads per request, by one update or a scatter."""

import functools

import jax
import jax.numpy as jnp

from dspark_jax.sharding import per_device

CACHE, NEW = (None, "batch", "kv_heads", None, None), ("batch", "kv_heads", None, None)
"""Logical axes of a stack of caches, and of new rows."""


def cache_write(
    key: jax.Array,
    value: jax.Array,
    new_key: jax.Array,
    new_value: jax.Array,
    places: jax.Array,
    *,
    layer: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """See `api.cache_write`."""
    # On every device of a mesh its own requests' rows: the compiler would collect those of all first.
    put = per_device(lambda *arrays: (_put(*arrays),), (CACHE, NEW, ("batch",), ()), (CACHE,))
    number = jnp.asarray(layer, jnp.int32)
    both = [
        functools.reduce(lambda cache, place, new=new: put(cache, new, place, number)[0], jnp.maximum(places, 0), cache)
        for cache, new in ((key, new_key), (value, new_value))
    ]
    return both[0], both[1]


def _put(stack: jax.Array, new: jax.Array, place: jax.Array, number: jax.Array) -> jax.Array:
    """New rows [B, K, T, H] at place [B] of a layer."""
    if len(new) == 1:  # updated in place; on a CPU the other way is a slow loop
        return jax.lax.dynamic_update_slice(stack, new[None], (number, 0, 0, place[0], 0))

    # One piece [K, T, H] per request. With pieces [K, H], or requests as a batching dimension (`vmap`), a TPU would
    # transpose the whole cache before it and back again; with indices that are clipped, a mesh would collect it.
    return jax.lax.scatter(
        stack,
        jnp.stack([jnp.full_like(place, number), jnp.arange(place.size, dtype=place.dtype), place], axis=-1),
        new,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 3)
        ),
        indices_are_sorted=True,
        unique_indices=True,
        mode="drop",
    )
