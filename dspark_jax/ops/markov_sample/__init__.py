"""The sequential head's sampling loop: gamma tokens left to right, each biased by the ones before it."""

from dspark_jax.ops.markov_sample.api import markov_sample
from dspark_jax.ops.markov_sample.chain import Step, sample_chain

__all__ = ["Step", "markov_sample", "sample_chain"]
