"""What every drafter gives to training and to the engine."""

import dataclasses
from typing import Any, Protocol

import jax

from dspark_jax.ops.sampling import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
    """Draft tokens of one decoding round.

    Attributes:
      tokens: [B, G] drafted ids.
      logits: [B, G, V] float32, the distribution (before temperature) that each token was drawn from.
      confidence: [B, G] logit of the probability that draft k is accepted given that all before it were, or None.
    """

    tokens: jax.Array
    logits: jax.Array
    confidence: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockOutputs:
    """Training-side output of a drafter: A blocks of G predictions per sequence.

    Drafters that go token by token have rows instead of blocks: the row at t follows an anchor at t + 1.

    Attributes:
      hidden: [B, A, G, D] after the drafter's final norm; the LM head and the other heads read it.
      prev_tokens: [B, A, G] token before each label (teacher forced; the anchor token for k = 0).
      labels: [B, A, G] data token that position k predicts (anchor + 1 + k), 0 where there is none.
      teacher_rows: [B, A, G] sequence row whose target distribution is predicted (label index - 1).
      mask: [B, A, G] bool, the supervised prefix of each block; EAGLE-3's rows may be supervised from a later step on.
    """

    hidden: jax.Array
    prev_tokens: jax.Array
    labels: jax.Array
    teacher_rows: jax.Array
    mask: jax.Array


class Drafter(Protocol):
    """The decoding side, the same for every drafter. It uses the `target`'s embedding and LM head.

    A drafter with an attribute `stops_drafting = True` ends a proposal at a drafted stop token: what it drafts after
    it is not counted as proposed.
    """

    block_size: int
    taps: tuple[int, ...]
    dtype: Any

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache for `length` positions of `batch` requests."""

    def extend(
        self, cache: Any, features: jax.Array, tokens: jax.Array, positions: jax.Array, counts: jax.Array
    ) -> Any:
        """Extends the cache by committed tokens.

        Args:
          cache: the drafter's cache.
          features: [B, T, M*D] target features of the tokens.
          tokens: [B, T].
          positions: [B, T] consecutive in each row.
          counts: [B] how many leading rows are real; the others must leave nothing visible.

        Returns:
          The new cache.
        """

    def propose(
        self,
        target: Any,
        cache: Any,
        anchors: jax.Array,
        positions: jax.Array,
        uniforms: jax.Array,
        sampling: Sampling,
    ) -> tuple[Proposal, Any]:
        """Drafts `block_size` tokens after each anchor.

        Args:
          target: its `embed` and `unembed` are used.
          cache: holds the features of all positions before the anchors, with room for `block_size` rows more.
          anchors: [B] newest token of each request (not yet seen by the target).
          positions: [B] the anchors' absolute positions.
          uniforms: [B, G, 2] int32, one per drafted token; see `ops.sampling.words`.
          sampling: applied to every draft position.

        Returns:
          The drafts, and the cache: what it holds from the anchors on is stale, and the next `extend` overwrites it.
        """
        ...


def is_confident(drafter: Any) -> bool:
    """Whether a drafter (or None, which is not) has a confidence head."""
    return getattr(drafter, "confidence", None) is not None
