"""The gated head: the hidden state decides how much of the token before counts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.drafter.heads.base import SequentialHead
from dspark_jax.sharding import Param
from dspark_jax.target.layers import normal


class GatedHead(SequentialHead):
    """latent_k = sigmoid(G [h_k; W1[x_{k-1}]] + b) * W1[x_{k-1}] (trap 20)."""

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, *, scale: float, rngs: nnx.Rngs):
        """A gate near one half."""
        super().__init__(vocab_size, hidden_size, rank, scale=scale, rngs=rngs)
        self.gate = normal(rngs, (), (hidden_size + rank, rank), ("features", "rank"), scale)
        self.gate_bias = Param(jnp.zeros((rank,), jnp.float32), axes=("rank",))

    def step(self, state: Any, hidden: jax.Array, prev_embedding: jax.Array) -> tuple[Any, jax.Array]:
        """See `SequentialHead.step`; computed in float32."""
        seen = jnp.concatenate([hidden.astype(jnp.float32), prev_embedding.astype(jnp.float32)], axis=-1)
        return state, jax.nn.sigmoid(seen @ self.gate[...] + self.gate_bias[...]) * prev_embedding
