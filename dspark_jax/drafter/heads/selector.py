"""The candidate selector (DFlash 2): drafts are chosen among the likeliest tokens of the backbone."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.heads.base import SequentialHead
from dspark_jax.ops.sampling import Sampling, sample
from dspark_jax.target.layers import narrow, normal


class SelectorHead(SequentialHead):
    """latent_k = W1[x_{k-1}] * (h_k P), and only the `candidates` largest base logits of a position stay.

    So a candidate's logit is unary + <W1[previous] * h P, W2[candidate]>, and every other token has none. The terms of
    the loss over the vocabulary see the base logits alone; the selector has its own (`training/losses/selector.py`).
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, rank: int, *, scale: float, rngs: nnx.Rngs, candidates: int = 16
    ):
        """`candidates` is how many tokens of a position may be drafted."""
        super().__init__(vocab_size, hidden_size, rank, scale=scale, rngs=rngs)
        self.candidates = candidates
        self.projection = normal(rngs, (), (hidden_size, rank), ("features", "rank"), scale)

    @classmethod
    def of(cls, arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs) -> "SelectorHead":
        """See `SequentialHead.of`."""
        sizes = (arch.vocab_size, arch.hidden_size, config.markov_rank)
        return cls(*sizes, scale=config.initializer_range, rngs=rngs, candidates=config.selector_top_k)

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `target.decode_weights`."""
        super().fuse_weights(dtype, join=join)
        narrow(self.projection, dtype)

    def step(self, state: Any, hidden: jax.Array, prev_embedding: jax.Array) -> tuple[Any, jax.Array]:
        """See `SequentialHead.step`."""
        weight = self.projection[...]
        projected = jnp.einsum("...d,dr->...r", hidden.astype(weight.dtype), weight, preferred_element_type=jnp.float32)
        return state, prev_embedding * projected

    def scores(self, unary: jax.Array, latent: jax.Array, ids: jax.Array) -> jax.Array:
        """Logits of candidates: unary [..., K] of tokens ids [..., K], latent [..., R] -> [..., K] float32."""
        chosen = self.w2[...][ids].astype(jnp.float32)
        return unary + jnp.sum(latent.astype(jnp.float32)[..., None, :] * chosen, axis=-1)

    def best(self, base_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The candidates of base logits [..., V]: their logits and ids, [..., K] each, in the order of the ids.

        In that order a draw among them is the draw over the vocabulary that scores it, ties included.
        """
        _, ids = jax.lax.top_k(base_logits, self.candidates)
        ids = jnp.sort(ids, axis=-1)
        return jnp.take_along_axis(base_logits, ids, axis=-1).astype(jnp.float32), ids

    def logits(self, base_logits: jax.Array, hidden: jax.Array, prev_embedding: jax.Array) -> jax.Array:
        """See `SequentialHead.logits`; minus infinity where a token is no candidate."""
        unary, ids = self.best(base_logits)
        scores = self.scores(unary, self.latent(hidden, prev_embedding), ids)
        return _spread(scores, ids, base_logits.shape[-1])

    def sample(
        self, base_logits: jax.Array, hidden: jax.Array, anchors: jax.Array, uniforms: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, jax.Array]:
        """See `SequentialHead.sample`: a walk from candidate to candidate."""
        unary, ids = self.best(base_logits)
        tokens, rows, previous = [], [], anchors
        for k, uniform in enumerate(uniforms):
            _, latent = self.step(None, hidden[k], self.embed(previous))
            rows.append(self.scores(unary[k], latent, ids[k]))
            chosen = sample(rows[-1], sampling, uniform)
            previous = jnp.take_along_axis(ids[k], chosen[:, None], axis=-1)[:, 0]
            tokens.append(previous)
        return jnp.stack(tokens), _spread(jnp.stack(rows), ids, base_logits.shape[-1])


def _spread(scores: jax.Array, ids: jax.Array, vocabulary: int) -> jax.Array:
    """Scores [..., K] of tokens ids [..., K] as logits [..., V], minus infinity elsewhere."""
    nothing = jnp.full((*ids.shape[:-1], vocabulary), -jnp.inf, jnp.float32)
    return jnp.put_along_axis(nothing, ids, scores, axis=-1, inplace=False)
