"""Second step of a round: how many of the drafted tokens are verified.

A scheduler may use the confidences c_1..c_k to decide about draft k, never the drafted token k itself; anything else
biases the output (paper appendix A, trap 29). Both schedulers here are prefix rules, so they satisfy this.
"""

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import Proposal


def fixed(tokens: jax.Array) -> jax.Array:
    """Verifies every draft: tokens [B, G] -> lengths [B] = G."""
    return jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)


def threshold(confidence: jax.Array, minimum: jax.Array | float) -> jax.Array:
    """Keeps the drafts before the first one whose confidence is below `minimum` (trap 28).

    Args:
      confidence: [B, G] logits; draft k is kept while sigmoid(c_1), ..., sigmoid(c_k) >= minimum.
      minimum: in [0, 1]; 0 keeps everything.

    Returns:
      lengths [B] in 0..G; 0 verifies the anchor alone.
    """
    kept = jax.nn.sigmoid(confidence.astype(jnp.float32)) >= minimum
    return jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=1), axis=1)


def schedule(proposal: Proposal, minimum: jax.Array | float | None) -> jax.Array:
    """Lengths [B]: `fixed` where `minimum` is None, else `threshold`."""
    if minimum is None:
        return fixed(proposal.tokens)
    if proposal.confidence is None:
        raise ValueError("a confidence threshold needs a drafter with a confidence head")
    return threshold(proposal.confidence, minimum)
