"""Sequential heads (paper 3.2): a low-rank bias on the logits of position k from the tokens before it.

All of them add latent_k W2^T to the base logits and differ in the latent vector [R]: the embedding W1[x_{k-1}] itself
(vanilla), the embedding times a gate that sees the hidden state (gated), or the output of a small recurrent cell that
remembers the whole prefix of the block (rnn).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.ops.markov_sample import markov_sample, sample_chain
from dspark_jax.ops.sampling import Sampling
from dspark_jax.sharding import Param
from dspark_jax.target.layers import narrow, normal

_LANES = 128


class MarkovHead(nnx.Module):
    """The vanilla head: B(x_{k-1}, .) = W1[x_{k-1}] W2^T with W1, W2 in [V, R].

    Where R is a multiple of 128, W1 is stored as [V, R/128, 128]: only then can a TPU kernel fetch single rows.
    """

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, *, scale: float, rngs: nnx.Rngs):
        """`hidden_size` is the width D of the hidden states, which the other heads read."""
        del hidden_size
        self.rank = rank
        rows = (rank // _LANES, _LANES) if rank % _LANES == 0 else (rank,)
        axes = ("vocab", "rank_rows", "rank") if len(rows) == 2 else ("vocab", "rank")
        self.w1 = normal(rngs, (), (vocab_size, *rows), axes, scale)
        self.w2 = normal(rngs, (), (vocab_size, rank), ("vocab", "rank"), scale)

    def fuse_weights(self, dtype: Any) -> None:
        """See `target.decode_weights`: W2 is read again for every draft."""
        narrow(self.w1, dtype)
        narrow(self.w2, dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Previous tokens [...] -> W1 rows [..., R] in the weights' type."""
        return self.w1[...][tokens].reshape(*tokens.shape, self.rank)

    def bias(self, latent: jax.Array) -> jax.Array:
        """Latent vectors [..., R] -> float32 logit bias [..., V]."""
        w2 = self.w2[...]
        return jnp.einsum("...r,vr->...v", latent.astype(w2.dtype), w2, preferred_element_type=jnp.float32)

    def latent(self, hidden: jax.Array, prev_embedding: jax.Array) -> jax.Array:
        """Teacher-forced latent vectors of whole blocks, all positions at once where the head allows it.

        Args:
          hidden: [..., G, D] of the backbone.
          prev_embedding: [..., G, R], `embed` of the token before each position.

        Returns:
          [..., G, R] float32.
        """
        del hidden
        return prev_embedding

    def sample(
        self, base_logits: jax.Array, hidden: jax.Array, anchors: jax.Array, uniforms: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, jax.Array]:
        """Drafts G tokens left to right.

        Args:
          base_logits: [G, B, V] of the backbone.
          hidden: [G, B, D].
          anchors: [B] tokens before the first draft.
          uniforms: [G, B, 2].
          sampling: per request.

        Returns:
          tokens [G, B] and biased logits [G, B, V] float32.
        """
        del hidden
        return markov_sample(base_logits, self.w1[...], self.w2[...], anchors, uniforms, sampling)


class GatedHead(MarkovHead):
    """latent_k = sigmoid(G [h_k; W1[x_{k-1}]] + b) * W1[x_{k-1}] (trap 20)."""

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, *, scale: float, rngs: nnx.Rngs):
        """A gate near one half."""
        super().__init__(vocab_size, hidden_size, rank, scale=scale, rngs=rngs)
        self.gate = normal(rngs, (), (hidden_size + rank, rank), ("features", "rank"), scale)
        self.gate_bias = Param(jnp.zeros((rank,), jnp.float32), axes=("rank",))

    def latent(self, hidden: jax.Array, prev_embedding: jax.Array) -> jax.Array:
        """See `MarkovHead.latent`; computed in float32."""
        seen = jnp.concatenate([hidden.astype(jnp.float32), prev_embedding.astype(jnp.float32)], axis=-1)
        return jax.nn.sigmoid(seen @ self.gate[...] + self.gate_bias[...]) * prev_embedding

    def sample(
        self, base_logits: jax.Array, hidden: jax.Array, anchors: jax.Array, uniforms: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, jax.Array]:
        """See `MarkovHead.sample`."""

        def step(k: int, state: None, previous: jax.Array) -> tuple[jax.Array, None]:
            return base_logits[k] + self.bias(self.latent(hidden[k], self.embed(previous))), state

        return sample_chain(step, None, anchors, uniforms, sampling)[:2]


class RNNHead(MarkovHead):
    """A recurrent cell over the block (trap 20): with z_k = J [s_{k-1}; W1[x_{k-1}]; h_k] + b in three chunks g, c, o,

        s_k = sigmoid(g) * s_{k-1} + (1 - sigmoid(g)) * tanh(c),    latent_k = tanh(o),    s_0 = 0;

    the output of a position comes from the state before it.
    """

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, *, scale: float, rngs: nnx.Rngs):
        """J is [2 R + D, 3 R]: inputs in the order state, embedding, hidden state."""
        super().__init__(vocab_size, hidden_size, rank, scale=scale, rngs=rngs)
        self.joint = normal(rngs, (), (2 * rank + hidden_size, 3 * rank), ("features", "rank"), scale)
        self.joint_bias = Param(jnp.zeros((3 * rank,), jnp.float32), axes=("rank",))

    def _inputs(self, hidden: jax.Array, prev_embedding: jax.Array) -> jax.Array:
        """The part of z [..., 3 R] that does not wait for the state."""
        seen = jnp.concatenate([prev_embedding.astype(jnp.float32), hidden.astype(jnp.float32)], axis=-1)
        return seen @ self.joint[...][self.rank :] + self.joint_bias[...]

    def _cell(self, state: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(state after [..., R], latent [..., R])."""
        gate, candidate, out = jnp.split(inputs + state @ self.joint[...][: self.rank], 3, axis=-1)
        keep = jax.nn.sigmoid(gate)
        return keep * state + (1.0 - keep) * jnp.tanh(candidate), jnp.tanh(out)

    def latent(self, hidden: jax.Array, prev_embedding: jax.Array) -> jax.Array:
        """See `MarkovHead.latent`; a scan over G in which only the state's product is left to do."""
        inputs = jnp.moveaxis(self._inputs(hidden, prev_embedding), -2, 0)
        start = jnp.zeros((*inputs.shape[1:-1], self.rank), jnp.float32)
        _, latents = jax.lax.scan(self._cell, start, inputs)
        return jnp.moveaxis(latents, 0, -2)

    def sample(
        self, base_logits: jax.Array, hidden: jax.Array, anchors: jax.Array, uniforms: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, jax.Array]:
        """See `MarkovHead.sample`."""

        def step(k: int, state: jax.Array, previous: jax.Array) -> tuple[jax.Array, jax.Array]:
            state, latent = self._cell(state, self._inputs(hidden[k], self.embed(previous)))
            return base_logits[k] + self.bias(latent), state

        start = jnp.zeros((anchors.shape[0], self.rank), jnp.float32)
        return sample_chain(step, start, anchors, uniforms, sampling)[:2]


_HEADS: dict[str, type[MarkovHead]] = {"vanilla": MarkovHead, "gated": GatedHead, "rnn": RNNHead}


def make_head(kind: str, *shape: int, scale: float, rngs: nnx.Rngs) -> Any:
    """The sequential head that a config names (`drafter.markov_head_type`); `shape` is V, D, R."""
    return _HEADS[kind](*shape, scale=scale, rngs=rngs)
