"""Rows that are put into the caches of a layer, request by request."""

from dspark_jax.ops.cache_write.api import OPERATION, cache_write

__all__ = ["OPERATION", "cache_write"]
