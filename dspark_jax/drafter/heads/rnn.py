"""The recurrent head: a small cell that remembers the whole prefix of the block."""

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.drafter.heads.base import SequentialHead
from dspark_jax.sharding import Param
from dspark_jax.target.layers import normal


class RNNHead(SequentialHead):
    """A recurrent cell over the block (trap 20): with z_k = J [s_{k-1}; W1[x_{k-1}]; h_k] + b in three chunks g, c, o,

        s_k = sigmoid(g) * s_{k-1} + (1 - sigmoid(g)) * tanh(c),    latent_k = tanh(o),    s_0 = 0;

    the output of a position comes from the state before it.
    """

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, *, scale: float, rngs: nnx.Rngs):
        """J is [2 R + D, 3 R]: inputs in the order state, embedding, hidden state."""
        super().__init__(vocab_size, hidden_size, rank, scale=scale, rngs=rngs)
        self.joint = normal(rngs, (), (2 * rank + hidden_size, 3 * rank), ("features", "rank"), scale)
        self.joint_bias = Param(jnp.zeros((3 * rank,), jnp.float32), axes=("rank",))

    def start(self, shape: tuple[int, ...]) -> jax.Array:
        """See `SequentialHead.start`."""
        return jnp.zeros((*shape, self.rank), jnp.float32)

    def step(self, state: jax.Array, hidden: jax.Array, prev_embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `SequentialHead.step`."""
        return self._cell(state, self._inputs(hidden, prev_embedding))

    def latent(self, hidden: jax.Array, prev_embedding: jax.Array) -> jax.Array:
        """See `SequentialHead.latent`; in the scan over G only the state's product is left to do."""
        inputs = jnp.moveaxis(self._inputs(hidden, prev_embedding), -2, 0)
        _, latents = jax.lax.scan(self._cell, self.start(inputs.shape[1:-1]), inputs)
        return jnp.moveaxis(latents, 0, -2)

    def _inputs(self, hidden: jax.Array, prev_embedding: jax.Array) -> jax.Array:
        """The part of z [..., 3 R] that does not wait for the state."""
        seen = jnp.concatenate([prev_embedding.astype(jnp.float32), hidden.astype(jnp.float32)], axis=-1)
        return seen @ self.joint[...][self.rank :] + self.joint_bias[...]

    def _cell(self, state: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(state after [..., R], latent [..., R])."""
        gate, candidate, out = jnp.split(inputs + state @ self.joint[...][: self.rank], 3, axis=-1)
        keep = jax.nn.sigmoid(gate)
        return keep * state + (1.0 - keep) * jnp.tanh(candidate), jnp.tanh(out)
