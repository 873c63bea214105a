"""DSpark in JAX: train, evaluate and run drafters for speculative decoding (paper: arXiv 2607.05147)."""
