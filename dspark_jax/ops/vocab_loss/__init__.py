"""LM head and Markov bias -> terms of the loss and acceptance, without a [tokens, V] array."""

from dspark_jax.ops.vocab_loss.api import VocabLoss, vocab_loss
from dspark_jax.ops.vocab_loss.result import Favourites
from dspark_jax.ops.vocab_loss.term import Distributions, VocabTerm

__all__ = ["Distributions", "Favourites", "VocabLoss", "VocabTerm", "vocab_loss"]
