"""The definition of `cache_write`: row by row."""

import jax
import jax.numpy as jnp


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
    (b, _, t, _), row = new_key.shape, jnp.arange(key.shape[3])

    def put(cache: jax.Array, new: jax.Array) -> jax.Array:
        for place in places:
            for request in range(b):
                for number in range(t):
                    here = (place[request] >= 0) & (row == place[request] + number)
                    old = cache[layer, request]
                    fresh = jnp.where(here[:, None], new[request, :, number, None], old)
                    cache = cache.at[layer, request].set(fresh)
        return cache

    return put(key, new_key), put(value, new_value)
