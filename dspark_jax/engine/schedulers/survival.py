"""Probabilities that drafts survive, as schedulers read them."""

import jax
import jax.numpy as jnp


def scaled(confidence: jax.Array, temperatures: jax.Array | None, bias: jax.Array | None = None) -> jax.Array:
    """Confidence logits [B, G] after calibration, float32: plus a bias, then over the temperatures (paper: STS).

    Args:
      confidence: [B, G] logits.
      temperatures: [G] or [B, G]; None is 1.
      bias: [] or [B], shared by all positions and fitted before the temperatures; None is 0.
    """
    logits = confidence.astype(jnp.float32)
    if bias is not None:
        logits += bias if jnp.ndim(bias) == 0 else bias[:, None]
    return logits if temperatures is None else logits / temperatures


def survival(confidence: jax.Array, temperatures: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
    """Probability a_k = sigmoid(c_1 / T_1) ... sigmoid(c_k / T_k) that the first k drafts are all accepted.

    Args:
      confidence: [B, G] logits.
      temperatures: see `scaled`.
      bias: see `scaled`.

    Returns:
      [B, G] float32, never rising along G.
    """
    return jnp.cumprod(jax.nn.sigmoid(scaled(confidence, temperatures, bias)), axis=1)
