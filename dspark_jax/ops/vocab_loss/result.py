"""What every implementation of `vocab_loss` returns."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VocabLoss:
    """Loss of a batch of draft rows, and what it is made of; everything float32.

    Attributes:
      loss: scalar, sum over rows of weight * (ce * CE + l1 * L1 + soft_ce * soft CE), plus, over blocks, length * what
        is missing of the expected accepted length; not normalised.
      ce: [B, T] -log p_draft(label). Not differentiable, like the two below.
      l1: [B, T] sum_v |p_draft - p_teacher|, twice the total variation, in 0..2.
      accept: [B, T] 1 - l1 / 2, the probability that a token drawn from p_draft is accepted.
      soft_ce: [B, T] -sum_v p_teacher log p_draft, or None where its coefficient is 0.
    """

    loss: jax.Array
    ce: jax.Array
    l1: jax.Array
    accept: jax.Array
    soft_ce: jax.Array | None = None
