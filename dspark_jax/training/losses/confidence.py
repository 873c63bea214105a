"""The confidence head's error: how far it is from the acceptance of the draft distribution."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import DrafterModule, is_confident
from dspark_jax.metrics import Ratio
from dspark_jax.training.losses.base import Blocks, BlockTerm


class Confidence(BlockTerm):
    """Binary cross-entropy with the acceptance, which is constant to it; its gradients do reach the backbone."""

    reported: ClassVar[bool] = True

    def applies(self, drafter: DrafterModule) -> bool:
        """Where there is a confidence head."""
        return is_confident(drafter)

    def __call__(self, blocks: Blocks) -> tuple[jax.Array, dict[str, Ratio]]:
        """See `BlockTerm`.

        The metrics are weighted means of sigmoid(confidence) - acceptance (`confidence_bias`), of its size
        (`confidence_abs_error`), and of the difference of the products of 1..k (`confidence_prefix_bias`).
        """
        head, mask = blocks.drafter.confidence, blocks.outputs.mask
        assert head is not None
        hidden = blocks.outputs.hidden if blocks.outputs.trusted is None else blocks.outputs.trusted
        logits = jnp.where(mask, head(hidden, blocks.previous).astype(jnp.float32), 0.0)
        predicted = jnp.where(mask, jax.nn.sigmoid(logits), 0.0)
        return _binary_cross_entropy(logits, blocks.accept), _calibration(predicted, blocks.accept, blocks.weights)


def _binary_cross_entropy(logits: jax.Array, probability: jax.Array) -> jax.Array:
    """-p log sigmoid(x) - (1 - p) log sigmoid(-x), without overflow."""
    return jax.nn.softplus(logits) - probability * logits


def _calibration(confidence: jax.Array, accept: jax.Array, weights: jax.Array) -> dict[str, Ratio]:
    """How far predicted acceptance [B, A, G] is from the actual one; both are 0 where nothing is supervised."""
    error = confidence - accept
    prefix_error = jnp.cumprod(confidence, axis=-1) - jnp.cumprod(accept, axis=-1)
    denominator = jnp.sum(weights)
    return {
        "confidence_bias": Ratio(jnp.sum(weights * error), denominator),
        "confidence_abs_error": Ratio(jnp.sum(weights * jnp.abs(error)), denominator),
        "confidence_prefix_bias": Ratio(jnp.sum(weights * prefix_error), denominator),
    }
