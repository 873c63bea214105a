"""What every implementation of `vocab_loss` returns."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Favourites:
    """Likeliest tokens of rows.

    Attributes:
      draft: [B, T, K] int32, the K largest draft logits, likeliest first.
      target: [B, T] int32, the target's largest logit.
    """

    draft: jax.Array
    target: jax.Array

    @classmethod
    def of(cls, logits: jax.Array, teacher_logits: jax.Array, count: int) -> "Favourites | None":
        """From logits [.., V]; None if `count`, which is K, is 0."""
        if not count:
            return None
        return cls(jax.lax.top_k(logits, count)[1], jnp.argmax(teacher_logits, axis=-1).astype(jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VocabLoss:
    """Loss of a batch of draft rows, and what it is made of; everything float32.

    Attributes:
      loss: scalar, the sum of all terms, not normalised.
      values: name of a term -> [B, T] its value for every row, without coefficient and weight. Not differentiable.
      accept: [B, T] 1 - sum_v |p_draft - p_teacher| / 2, the probability that a token drawn from p_draft is accepted.
        Not differentiable.
      favourites: likeliest tokens of every row, if they were asked for.
    """

    loss: jax.Array
    values: dict[str, jax.Array]
    accept: jax.Array
    favourites: Favourites | None = None
