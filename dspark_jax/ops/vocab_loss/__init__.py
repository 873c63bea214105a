"""LM head and Markov bias -> cross-entropy, L1 distance and acceptance, without a [tokens, V] array."""

from dspark_jax.ops.vocab_loss.api import VocabLoss, vocab_loss

__all__ = ["VocabLoss", "vocab_loss"]
