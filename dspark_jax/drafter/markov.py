"""The Markov head (paper 3.2): a low-rank bias on the logits of position k from the token before it."""

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.target.layers import normal

_LANES = 128


class MarkovHead(nnx.Module):
    """B(x_{k-1}, .) = W1[x_{k-1}] W2^T with W1, W2 in [V, R].

    Where R is a multiple of 128, W1 is stored as [V, R/128, 128]: only then can a TPU kernel fetch single rows.
    """

    def __init__(self, vocab_size: int, rank: int, *, scale: float, rngs: nnx.Rngs):
        self.rank = rank
        rows = (rank // _LANES, _LANES) if rank % _LANES == 0 else (rank,)
        axes = ("vocab", "rank_rows", "rank") if len(rows) == 2 else ("vocab", "rank")
        self.w1 = normal(rngs, (), (vocab_size, *rows), axes, scale)
        self.w2 = normal(rngs, (), (vocab_size, rank), ("vocab", "rank"), scale)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Previous tokens [...] -> W1 rows [..., R] in float32."""
        return self.w1[...][tokens].reshape(*tokens.shape, self.rank)

    def bias(self, prev_embedding: jax.Array) -> jax.Array:
        """W1 rows [..., R] -> float32 logit bias [..., V]."""
        return jnp.einsum("...r,vr->...v", prev_embedding, self.w2[...], preferred_element_type=jnp.float32)
