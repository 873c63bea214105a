"""Heads of block drafters, one per file. `registry.HEADS` has the sequential ones by name."""

from dspark_jax.drafter.heads.base import SequentialHead
from dspark_jax.drafter.heads.confidence import ConfidenceHead
from dspark_jax.registry import HEADS, Entry

__all__ = ["HEADS", "ConfidenceHead", "Entry", "SequentialHead"]
