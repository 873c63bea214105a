"""What every implementation of `vocab_loss` returns."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VocabLoss:
    """Loss of a batch of draft rows, and what it is made of; everything float32.

    Attributes:
      loss: scalar, the sum of all terms, not normalised.
      values: name of a term -> [B, T] its value for every row, without coefficient and weight. Not differentiable.
      accept: [B, T] 1 - sum_v |p_draft - p_teacher| / 2, the probability that a token drawn from p_draft is accepted.
        Not differentiable.
    """

    loss: jax.Array
    values: dict[str, jax.Array]
    accept: jax.Array
