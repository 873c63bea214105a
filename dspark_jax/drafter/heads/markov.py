"""The vanilla head: the bias follows from the token before alone."""

from typing import Any

import jax

from dspark_jax.drafter.heads.base import SequentialHead
from dspark_jax.ops.markov_sample import markov_sample
from dspark_jax.ops.sampling import Sampling


class MarkovHead(SequentialHead):
    """latent_k = W1[x_{k-1}], so the bias is B(x_{k-1}, .) = W1[x_{k-1}] W2^T."""

    def step(self, state: Any, hidden: jax.Array, prev_embedding: jax.Array) -> tuple[Any, jax.Array]:
        """See `SequentialHead.step`."""
        del hidden
        return state, prev_embedding

    def sample(
        self, base_logits: jax.Array, hidden: jax.Array, anchors: jax.Array, uniforms: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, jax.Array]:
        """See `SequentialHead.sample`: an operation of its own, which has kernels."""
        del hidden
        return markov_sample(base_logits, self.w1[...], self.w2[...], anchors, uniforms, sampling)
