"""The sequential head's sampling loop: gamma tokens left to right, each biased by the one before it."""

from dspark_jax.ops.markov_sample.api import markov_sample

__all__ = ["markov_sample"]
