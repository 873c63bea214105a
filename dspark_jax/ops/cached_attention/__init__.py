"""Decoding attention: a ragged block of query rows per request against its cache."""

from dspark_jax.ops.cached_attention.api import cached_attention
from dspark_jax.ops.cached_attention.rows import Rows

__all__ = ["Rows", "cached_attention"]
