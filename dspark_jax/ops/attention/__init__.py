"""Attention of a target over the rows of a pass: training, prompts, packed documents, windows."""

from dspark_jax.ops.attention.api import attention

__all__ = ["attention"]
