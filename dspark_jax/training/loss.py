"""The drafter's loss (paper 3.3): cross-entropy, total variation and confidence, as numerators over one denominator."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.config import LossConfig
from dspark_jax.drafter.interface import BlockOutputs
from dspark_jax.metrics import Ratio
from dspark_jax.ops.vocab_loss import vocab_loss

EPSILON = 1e-6
"""Added to the denominator, as the reference does; without any supervised token the loss is 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over a batch; sums of several batches add up to those of all of them (gradients of `total` too).

    Attributes:
      total: scalar, weighted sum of all terms, differentiable, not normalised.
      denominator: scalar, sum of the weights, or number of blocks (`loss.per_row`), shared by all terms.
      metrics: `Ratio`s by name, not differentiable; see `drafter_loss`.
    """

    total: jax.Array
    denominator: jax.Array
    metrics: dict[str, Ratio]

    def normalised(self) -> jax.Array:
        """The loss: total / (denominator + 1e-6)."""
        return self.total / (self.denominator + EPSILON)


def drafter_loss(
    drafter: Any,
    target: Any,
    outputs: BlockOutputs,
    last_hidden: jax.Array,
    config: LossConfig,
    *,
    vocab_chunk: int,
) -> LossSums:
    """Loss of a batch of draft blocks.

    Position k = 0..G-1 of a block weighs exp(-k / decay) where it is supervised. The confidence head learns the
    acceptance rate that the draft distribution has there, which is constant to it; gradients of its term do reach the
    backbone. The expected accepted length weighs whole blocks, all the same.

    Args:
      drafter: has `markov` (`embed(tokens) -> [.., R]`, `latent(hidden [.., G, D], embedding) -> [.., G, R]`, `w2`
        [V, R]) or None, and `confidence` (`(hidden [.., D], prev_embedding [.., R] | None) -> logits [..]`) or None.
      target: has `head` [V, D] and, where its logits are soft-capped, `softcap`; frozen.
      outputs: A blocks of G positions per sequence.
      last_hidden: [B, S, D] of the target, after its final norm; frozen.
      config: coefficients and decay.
      vocab_chunk: rows whose [rows, V] logits are in memory at once, per device (see `ops.vocab_loss`).

    Returns:
      `LossSums` with the metrics
        ce, l1, tv (= l1 / 2), soft_ce, confidence: weighted means of the terms; soft_ce where it has a weight,
        accept@k: plain mean over supervised positions k = 1..G of 1 - tv, given that all before k were accepted,
        tau_expected: 1 + sum over k of the product of accept@1..k, mean over blocks whose first position is supervised,
        confidence_bias, confidence_abs_error: weighted means of sigmoid(confidence) - acceptance, and its size,
        confidence_prefix_bias: the same for the products of 1..k,
        supervised: share of the block positions that are supervised.
    """
    b, a, g, d = outputs.hidden.shape
    mask = outputs.mask
    weights = jnp.exp(-jnp.arange(g, dtype=jnp.float32) / config.decay) * mask
    weight_sum = jnp.sum(weights)
    denominator = jnp.asarray(b * a, jnp.float32) if config.per_row else weight_sum
    previous = None if drafter.markov is None else drafter.markov.embed(outputs.prev_tokens)
    latent = None if drafter.markov is None else drafter.markov.latent(outputs.hidden, previous)
    rows = outputs.teacher_rows.reshape(b, a * g)
    teacher = jax.vmap(lambda states, at: states[at])(jax.lax.stop_gradient(last_hidden), rows)

    out = vocab_loss(
        outputs.hidden.reshape(b, a * g, d),
        None if latent is None else latent.reshape(b, a * g, -1),
        teacher,
        target.head,
        None if drafter.markov is None else drafter.markov.w2[...],
        outputs.labels.reshape(b, a * g),
        weights.reshape(b, a * g),
        ce=config.ce,
        l1=config.l1,
        soft_ce=config.soft_ce,
        length=config.length,
        block=g,
        softcap=getattr(target, "softcap", 0.0),
        chunk=vocab_chunk,
    )
    # Rows without supervision hold whatever the padding gave: clear them before they are multiplied with weights of 0.
    ce, l1, accept = (jnp.where(mask, x.reshape(b, a, g), 0.0) for x in (out.ce, out.l1, out.accept))
    total = out.loss
    metrics = {
        "ce": Ratio(jnp.sum(weights * ce), weight_sum),
        "l1": Ratio(jnp.sum(weights * l1), weight_sum),
        "tv": Ratio(0.5 * jnp.sum(weights * l1), weight_sum),
        **_acceptance(accept, mask),
    }
    if out.soft_ce is not None:
        soft_ce = jnp.where(mask, out.soft_ce.reshape(b, a, g), 0.0)
        metrics["soft_ce"] = Ratio(jnp.sum(weights * soft_ce), weight_sum)
    if drafter.confidence is not None:
        logits = jnp.where(mask, drafter.confidence(outputs.hidden, previous).astype(jnp.float32), 0.0)
        confidence = jnp.sum(weights * _binary_cross_entropy(logits, accept))
        total += config.confidence * confidence
        metrics["confidence"] = Ratio(confidence, weight_sum)
        metrics |= _calibration(jnp.where(mask, jax.nn.sigmoid(logits), 0.0), accept, weights)
    return LossSums(total, denominator, jax.lax.stop_gradient(metrics))


def _binary_cross_entropy(logits: jax.Array, probability: jax.Array) -> jax.Array:
    """-p log sigmoid(x) - (1 - p) log sigmoid(-x), without overflow."""
    return jax.nn.softplus(logits) - probability * logits


def _acceptance(accept: jax.Array, mask: jax.Array) -> dict[str, Ratio]:
    """Acceptance by position and expected accepted length; accept [B, A, G] is 0 where the mask is."""
    blocks = mask[..., 0]  # EAGLE-3 has rows that are supervised from a later step on: nothing is accepted of those
    expected = jnp.where(blocks, 1.0 + jnp.sum(jnp.cumprod(accept, axis=-1), axis=-1), 0.0)
    metrics = {
        f"accept@{k + 1}": Ratio(jnp.sum(accept[..., k]), jnp.sum(mask[..., k], dtype=jnp.float32))
        for k in range(mask.shape[-1])
    }
    metrics["tau_expected"] = Ratio(jnp.sum(expected), jnp.sum(blocks, dtype=jnp.float32))
    metrics["supervised"] = Ratio(jnp.sum(mask, dtype=jnp.float32), jnp.asarray(mask.size, jnp.float32))
    return metrics


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
