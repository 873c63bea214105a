"""What a term of the loss is that needs no distribution over the vocabulary; for the others see `ops.vocab_loss`."""

import dataclasses
from typing import ClassVar

import jax

from dspark_jax.drafter.interface import BlockOutputs, DrafterModule
from dspark_jax.metrics import Ratio
from dspark_jax.ops.vocab_loss import Favourites
from dspark_jax.target.interface import EmbeddingAndHead


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What the terms of a batch of blocks may read.

    Attributes:
      drafter: with its heads.
      target: its LM head; frozen.
      outputs: A blocks of G positions per sequence.
      previous: [B, A, G, R] Markov embedding of the token before each label, or None without a Markov head.
      accept: [B, A, G] acceptance of the draft distribution, 0 where nothing is supervised; a constant.
      weights: [B, A, G], 0 where nothing is supervised.
      latent: [B, A, G, R] what the Markov head makes of it, or None without one.
      favourites: [B, A, G, ..] likeliest tokens, of a drafter whose head chooses among candidates.
    """

    drafter: DrafterModule
    target: EmbeddingAndHead
    outputs: BlockOutputs
    previous: jax.Array | None
    accept: jax.Array
    weights: jax.Array
    latent: jax.Array | None = None
    favourites: Favourites | None = None


class BlockTerm:
    """A term that is a function of the drafter's output and of the acceptance."""

    reported: ClassVar[bool] = False
    """Whether its mean is a metric of every run; if not, of those in which it has a weight."""

    def applies(self, drafter: DrafterModule) -> bool:
        """Whether the drafter has what the term is about; if not, the term is left out."""
        del drafter
        return True

    def __call__(self, blocks: Blocks) -> tuple[jax.Array, dict[str, Ratio]]:
        """The value of every position, and metrics beside its weighted mean.

        Returns:
          [B, A, G] float32, differentiable and finite, also where nothing is supervised (the weight is 0 there); and
          metrics by name.
        """
        raise NotImplementedError
