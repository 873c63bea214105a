"""Caches of a stack of layers."""

import jax


def of_layer(key: jax.Array, value: jax.Array, layer: jax.Array | int | None) -> tuple[jax.Array, jax.Array]:
    """Key and value [B, K, C, H] of one layer of [L, B, K, C, H]; None: they are no stacks."""
    if layer is None:
        return key, value
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), (key, value))
