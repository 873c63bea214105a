"""The gated MLPs of a mixture of experts, of which every row goes through a few."""

from dspark_jax.ops.expert_mlp.api import expert_mlp
from dspark_jax.ops.expert_mlp.parts import Inner, Parts

__all__ = ["Inner", "Parts", "expert_mlp"]
