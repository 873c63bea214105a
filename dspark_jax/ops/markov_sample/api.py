"""Contract and dispatch of `markov_sample`."""

import jax

from dspark_jax.ops.dispatch import Operation
from dspark_jax.ops.sampling import Sampling

OPERATION = Operation("markov_sample", {"cpu": ["xla"], "gpu": ["pallas_gpu", "xla"], "tpu": ["pallas_tpu", "xla"]})


def markov_sample(
    base_logits: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    anchors: jax.Array,
    uniforms: jax.Array,
    sampling: Sampling,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Samples x_k from softmax((base_logits[k] + W1[x_{k-1}] W2^T) / temperature) for k = 1..G, x_0 = the anchor.

    Paper section 3.2. The request's top-k, top-p and min-p cut the biased distribution, as they cut the target's.

    Args:
      base_logits: [G, B, V] float32, positions first so that one step reads one contiguous slab.
      w1: [V, R] or [V, R/128, 128] rows of the previous tokens.
      w2: [V, R].
      anchors: [B] tokens x_0.
      uniforms: [G, B, 2] int32, one per draw; see `ops.sampling.words`.
      sampling: temperature and filters per request.
      implementation: None (the best one here), 'xla' (the definition, in plain jnp), 'pallas_gpu' or 'pallas_tpu' (no
        filters).

    Returns:
      tokens [G, B] int32 and biased logits [G, B, V] float32, before temperature and filters.

    Raises:
      ValueError: shapes do not fit, or the implementation is unknown.
    """
    g, b, v = base_logits.shape
    rank = w2.shape[-1]
    expected = {"w1": (v, rank), "w2": (v, rank), "anchors": (b,), "uniforms": (g, b, 2)}
    for name, array in {"w1": w1, "w2": w2, "anchors": anchors, "uniforms": uniforms}.items():
        if array.shape != expected[name] and not (name == "w1" and array.shape == (v, rank // 128, 128)):
            raise ValueError(f"{name} has shape {array.shape}, expected {expected[name]}")
    return OPERATION(implementation, base_logits, w1, w2, anchors, uniforms, sampling)
