"""The confidence head (paper 3.3): will draft k be accepted, given that all drafts before it were?"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.sharding import Param
from dspark_jax.target.layers import normal


class ConfidenceHead(nnx.Module):
    """c_k = sigmoid(w . [h_k; W1[x_{k-1}]] + b); it sees the tokens before k, never x_k (trap 9)."""

    def __init__(self, hidden_size: int, rank: int, *, scale: float, rngs: nnx.Rngs, offset: bool = True):
        """`rank` is 0 when the head does not read the Markov embedding; without `offset` b is 0."""
        self.rank = rank
        self.weight = normal(rngs, (), (hidden_size + rank,), ("norm",), scale)
        self.offset: Any = Param(jnp.zeros((1,), jnp.float32), axes=("norm",)) if offset else None

    def __call__(self, hidden: jax.Array, prev_embedding: jax.Array | None) -> jax.Array:
        """hidden [..., D], prev_embedding [..., R] -> float32 logits [...]; computed in float32 (a thin product)."""
        features = hidden.astype(jnp.float32)
        if self.rank:
            assert prev_embedding is not None
            features = jnp.concatenate([features, prev_embedding.astype(jnp.float32)], axis=-1)
        logits = features @ self.weight[...]
        return logits if self.offset is None else logits + self.offset[...][0]
