"""The definition of `markov_sample` in plain jnp."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.sampling import Sampling, sample


def markov_sample(
    base_logits: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    anchors: jax.Array,
    uniforms: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """See `api.markov_sample`. G is small and static, so the steps are laid out one by one."""
    tokens, logits, previous = [], [], anchors
    for base, uniform in zip(base_logits, uniforms, strict=True):
        rows = w1[previous].reshape(previous.shape[0], -1)
        bias = jnp.einsum("br,vr->bv", rows, w2, preferred_element_type=jnp.float32)
        biased = base.astype(jnp.float32) + bias
        previous = sample(biased, sampling, uniform)
        tokens.append(previous)
        logits.append(biased)
    return jnp.stack(tokens), jnp.stack(logits)
