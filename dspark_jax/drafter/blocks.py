"""Anchors and what follows from them: block inputs, labels, positions and the supervised mask. Pure functions."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
    """Where the blocks of each sequence start.

    Attributes:
      positions: [B, A] int32, ascending among the kept ones; 0 where not kept.
      keep: [B, A] bool; False marks a dummy of a sequence with fewer candidates than A.
    """

    positions: jax.Array
    keep: jax.Array


def anchor_candidates(loss_mask: jax.Array) -> jax.Array:
    """[B, S] bool: positions t with both t and t+1 supervised, so the last prompt token never is one (trap 5)."""
    supervised = loss_mask.astype(bool)
    following = jnp.pad(supervised[:, 1:], ((0, 0), (0, 1)))
    return supervised & following


def sample_anchors(keys: jax.Array, loss_mask: jax.Array, num_anchors: int) -> Anchors:
    """Draws up to `num_anchors` candidates per sequence, uniformly without replacement, in ascending order.

    Args:
      keys: [B] PRNG keys, one per sequence.
      loss_mask: [B, S], 1 on supervised tokens.
      num_anchors: A; may exceed S.
    """
    candidates = anchor_candidates(loss_mask)
    length = candidates.shape[1]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    order = jnp.where(candidates, noise, 2.0)
    taken = min(num_anchors, length)
    _, chosen = jax.lax.top_k(-order, taken)
    chosen = jnp.pad(chosen, ((0, 0), (0, num_anchors - taken)))
    count = jnp.sum(candidates, axis=1, keepdims=True)
    keep = (jnp.arange(num_anchors) < count) & (jnp.arange(num_anchors) < taken)
    ordered = jnp.sort(jnp.where(keep, chosen, length), axis=1)
    return Anchors(jnp.where(keep, ordered, 0).astype(jnp.int32), keep)


class BlockTargets(NamedTuple):
    """Labels of the blocks: every field is [B, A, G] (see `drafter.interface.BlockOutputs`)."""

    labels: jax.Array
    prev_tokens: jax.Array
    teacher_rows: jax.Array
    mask: jax.Array


def block_targets(tokens: jax.Array, loss_mask: jax.Array, anchors: Anchors, block_size: int) -> BlockTargets:
    """What position k of each block predicts: token anchor+1+k, from the target's row anchor+k.

    The same in both layouts of a block: the row of prediction k is k where the anchor's row is the first prediction,
    and k + 1 where it is thrown away (trap 1). A block is supervised up to its first label outside the
    sequence or the loss mask, gathered at the label's position (trap 7).

    Args:
      tokens: [B, S].
      loss_mask: [B, S].
      anchors: A blocks per sequence.
      block_size: G.
    """
    length = tokens.shape[1]
    index = anchors.positions[:, :, None] + 1 + jnp.arange(block_size)
    clamped = jnp.minimum(index, length - 1)

    def gather(rows: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, at: row[at])(rows, clamped)

    keep = anchors.keep[:, :, None]
    labels = jnp.where(keep, gather(tokens), 0)
    anchor_tokens = jnp.take_along_axis(tokens, anchors.positions, axis=1)[:, :, None]
    prev_tokens = jnp.concatenate([anchor_tokens, labels[:, :, :-1]], axis=-1)
    supervised = (index < length) & gather(loss_mask).astype(bool) & keep
    mask = jnp.cumprod(supervised, axis=-1).astype(bool)
    return BlockTargets(labels, prev_tokens, clamped - 1, mask)


def block_tokens(anchor_tokens: jax.Array, mask_token: int, rows: int) -> jax.Array:
    """Input ids of blocks: [...] anchors -> [..., rows] with the anchor first and masks after it."""
    masks = jnp.full((*anchor_tokens.shape, rows - 1), mask_token, anchor_tokens.dtype)
    return jnp.concatenate([anchor_tokens[..., None], masks], axis=-1)
