"""Training attention of block drafters: a block sees the context before its anchor, and itself."""

from dspark_jax.ops.block_attention.api import block_attention

__all__ = ["block_attention"]
