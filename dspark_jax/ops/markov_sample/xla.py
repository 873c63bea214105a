"""`markov_sample` in plain jnp, which is its definition as well."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.markov_sample.chain import sample_chain
from dspark_jax.ops.sampling import Sampling


def markov_sample(
    base_logits: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    anchors: jax.Array,
    uniforms: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """See `api.markov_sample`."""

    def step(k: int, state: None, previous: jax.Array) -> tuple[jax.Array, None]:
        rows = w1[previous].reshape(previous.shape[0], -1)
        bias = jnp.einsum("br,vr->bv", rows, w2, preferred_element_type=jnp.float32)
        return base_logits[k].astype(jnp.float32) + bias, state

    return sample_chain(step, None, anchors, uniforms, sampling)[:2]
