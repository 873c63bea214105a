"""From logits to probabilities to tokens: the one place where both the drafter and the target are sampled.

A draft token is drawn from the very float32 distribution that later scores it; anything else is not lossless.
"""

import dataclasses

import jax
import jax.numpy as jnp

GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy decoding: a one-hot distribution on the first largest logit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, per request; applied alike to drafter and target.

    Attributes:
      temperature: [B] float32.
      greedy: static promise that every temperature is 0, which saves all softmax work.
    """

    temperature: jax.Array
    greedy: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def constant(cls, temperature: float, batch: int) -> "Sampling":
        """The same temperature for a whole batch."""
        return cls(jnp.full((batch,), temperature, jnp.float32), greedy=temperature < GREEDY_BELOW)


def probabilities(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """softmax(logits / temperature) in float32; one-hot on the argmax where temperature < 1e-5.

    Args:
      logits: [..., V].
      temperature: broadcastable to logits' leading axes.
    """
    logits = logits.astype(jnp.float32)
    temperature = jnp.broadcast_to(temperature, logits.shape[:-1])[..., None]
    greedy = temperature < GREEDY_BELOW
    soft = jax.nn.softmax(logits / jnp.where(greedy, 1.0, temperature), axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return jnp.where(greedy, hard, soft)


def draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Inverse-CDF sample: the first index whose cumulative weight exceeds uniform * total.

    Args:
      weights: [..., V] non-negative, not all zero; need not be normalised.
      uniform: [...] in [0, 1).

    Returns:
      [...] int32. An index of zero weight is never returned.
    """
    cumulative = jnp.cumsum(weights.astype(jnp.float32), axis=-1)
    threshold = uniform[..., None] * cumulative[..., -1:]
    index = jnp.sum(cumulative <= threshold, axis=-1)
    # Rounding can put the threshold at the total; the last index of positive weight is then the answer.
    last = weights.shape[-1] - 1 - jnp.argmax(weights[..., ::-1] > 0, axis=-1)
    return jnp.minimum(index, last).astype(jnp.int32)


def sample(logits: jax.Array, sampling: Sampling, uniform: jax.Array) -> jax.Array:
    """Tokens [B] drawn from logits [B, V] with one uniform [B] each."""
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return draw(probabilities(logits, sampling.temperature), uniform)
