"""DSpark in JAX: train, evaluate and run drafters for speculative decoding (paper: arXiv 2607.05147)."""

from dspark_jax.interrupt import guard_imports

guard_imports()
