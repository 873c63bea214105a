"""What every sequential head is (paper 3.2): a low-rank bias on the logits of position k from the tokens before it.

All of them add latent_k W2^T to the base logits and differ in the latent vector [R].
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax import platform
from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.ops.markov_sample import sample_chain
from dspark_jax.ops.sampling import Sampling
from dspark_jax.target.layers import narrow, normal

_LANES = 128


class SequentialHead(nnx.Module):
    """Tables W1, W2 in [V, R], and a step from position to position; a subclass says which.

    Where R is a multiple of 128, W1 is stored as [V, R/128, 128]: only then can a TPU kernel fetch single rows.

    Attributes:
      candidates: of a head that chooses among some tokens of each position only, how many; the loss over the vocabulary
        is then that of the base logits. 0 of the others.
    """

    candidates: int = 0

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, *, scale: float, rngs: nnx.Rngs):
        """`hidden_size` is the width D of the hidden states, which some heads read."""
        del hidden_size
        self.rank = rank
        rows = (rank // _LANES, _LANES) if rank % _LANES == 0 else (rank,)
        axes = ("vocab", "rank_rows", "rank") if len(rows) == 2 else ("vocab", "rank")
        self.w1 = normal(rngs, (), (vocab_size, *rows), axes, scale)
        self.w2 = normal(rngs, (), (vocab_size, rank), ("vocab", "rank"), scale)

    @classmethod
    def of(cls, arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs) -> "SequentialHead":
        """A random head for a target of shape `arch`; a class with settings of its own reads them here."""
        sizes = (arch.vocab_size, arch.hidden_size, config.markov_rank)
        return cls(*sizes, scale=config.initializer_range, rngs=rngs)

    def start(self, shape: tuple[int, ...]) -> Any:
        """What the head remembers before the first position of blocks [...]; None of a head without memory."""
        del shape

    def step(self, state: Any, hidden: jax.Array, prev_embedding: jax.Array) -> tuple[Any, jax.Array]:
        """One position of blocks [...].

        Args:
          state: what `start` or the step before has given.
          hidden: [..., D] of the backbone at this position.
          prev_embedding: [..., R], `embed` of the token before it.

        Returns:
          The state after it, and the latent vectors [..., R].
        """
        raise NotImplementedError

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `target.decode_weights`: W2 is read again for every draft.

        A CPU multiplies these rows as float32 whatever their type, and would convert the tables at every call: it holds
        the numbers of `dtype` as float32.
        """
        del join
        for table in (self.w1, self.w2):
            narrow(table, dtype)
            if platform.current() == "cpu":
                narrow(table, jnp.float32)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Previous tokens [...] -> W1 rows [..., R] in the weights' type."""
        return self.w1[...][tokens].reshape(*tokens.shape, self.rank)

    def bias(self, latent: jax.Array) -> jax.Array:
        """Latent vectors [..., R] -> float32 logit bias [..., V]."""
        w2 = self.w2[...]
        return jnp.einsum("...r,vr->...v", latent.astype(w2.dtype), w2, preferred_element_type=jnp.float32)

    def latent(self, hidden: jax.Array, prev_embedding: jax.Array) -> jax.Array:
        """Teacher-forced latent vectors of whole blocks: all positions at once where the head has no memory.

        Args:
          hidden: [..., G, D] of the backbone.
          prev_embedding: [..., G, R], `embed` of the token before each position.

        Returns:
          [..., G, R] float32.
        """
        state = self.start(hidden.shape[:-2])
        if state is None:
            return self.step(None, hidden, prev_embedding)[1]
        steps = (jnp.moveaxis(hidden, -2, 0), jnp.moveaxis(prev_embedding, -2, 0))
        _, latents = jax.lax.scan(lambda state, at: self.step(state, *at), state, steps)
        return jnp.moveaxis(latents, 0, -2)

    def logits(self, base_logits: jax.Array, hidden: jax.Array, prev_embedding: jax.Array) -> jax.Array:
        """Teacher-forced logits [..., G, V] of whole blocks, from the base logits; see `latent` for the rest."""
        return base_logits + self.bias(self.latent(hidden, prev_embedding))

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

        def step(k: int, state: Any, previous: jax.Array) -> tuple[jax.Array, Any]:
            state, latent = self.step(state, hidden[k], self.embed(previous))
            return base_logits[k] + self.bias(latent), state

        return sample_chain(step, self.start(anchors.shape), anchors, uniforms, sampling)[:2]
