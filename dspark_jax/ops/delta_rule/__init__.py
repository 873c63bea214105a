"""Gated delta rule: linear attention whose state is a matrix per head."""

from dspark_jax.ops.delta_rule.api import OPERATION, delta_rule

__all__ = ["OPERATION", "delta_rule"]
