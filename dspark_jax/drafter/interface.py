"""What every drafter gives to the engine (`Drafter`) and to training (`DrafterModule`)."""

import dataclasses
from typing import Any, Protocol

import jax
from flax import nnx

from dspark_jax.drafter.blocks import Anchors
from dspark_jax.drafter.heads import ConfidenceHead, SequentialHead
from dspark_jax.drafter.vocabulary import DraftVocabulary
from dspark_jax.ops.sampling import Sampling
from dspark_jax.target.interface import EmbeddingAndHead


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
    """Draft tokens of one decoding round.

    Attributes:
      tokens: [B, G] drafted ids.
      logits: [B, G, V] float32, the distribution (before temperature) that each token was drawn from; minus infinity at
        tokens that cannot be drafted.
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
      trusted: [B, A, G, D] what the confidence head reads, where that is not `hidden`.
    """

    hidden: jax.Array
    prev_tokens: jax.Array
    labels: jax.Array
    teacher_rows: jax.Array
    mask: jax.Array
    trusted: jax.Array | None = None


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
        target: EmbeddingAndHead,
        cache: Any,
        anchors: jax.Array,
        positions: jax.Array,
        uniforms: jax.Array,
        sampling: Sampling,
    ) -> tuple[Proposal, Any]:
        """Drafts `block_size` tokens after each anchor.

        Args:
          target: its `embed` and `unembed` are used.
          cache: holds the features of all positions before the anchors, with room for `block_size` + 1 rows more.
          anchors: [B] newest token of each request (not yet seen by the target).
          positions: [B] the anchors' absolute positions.
          uniforms: [B, G, 2] int32, one per drafted token; see `ops.sampling.words`.
          sampling: applied to every draft position.

        Returns:
          The drafts, and the cache: what it holds from the anchors on is stale, and the next `extend` overwrites it.
        """
        ...


class DrafterModule(nnx.Module):
    """What a drafter that is trained has besides: a `Drafter` whose class is named in `kinds.KINDS` is one of these.

    It is made as `cls(arch, config, rngs=rngs, dtype=dtype)`. Parameters are float32; `dtype` is the compute type.

    Attributes:
      markov: sequential head, or None.
      confidence: confidence head, or None.
      vocabulary: the tokens that it can draft and its own LM head for them, or None: all of them, with the target's.
    """

    block_size: int
    taps: tuple[int, ...]
    dtype: Any
    stops_drafting: bool = False
    markov: SequentialHead | None = None
    confidence: ConfidenceHead | None = None
    vocabulary: DraftVocabulary | None = None

    def __call__(
        self,
        target: EmbeddingAndHead,
        features: jax.Array,
        tokens: jax.Array,
        loss_mask: jax.Array,
        anchors: Anchors,
        starts: jax.Array | None = None,
    ) -> BlockOutputs:
        """Training pass. The heads are not run: the loss does that.

        Args:
          target: its `embed` is used.
          features: [B, S, M*D] target features of the tokens.
          tokens: [B, S].
          loss_mask: [B, S], 1 on supervised tokens.
          anchors: A positions per sequence.
          starts: [B, S] first row of each row's document, where several are packed into a sequence; the first token of
            a document is then never supervised.
        """
        raise NotImplementedError

    def init_cache(self, batch: int, length: int) -> Any:
        """See `Drafter`."""
        raise NotImplementedError

    def extend(
        self, cache: Any, features: jax.Array, tokens: jax.Array, positions: jax.Array, counts: jax.Array
    ) -> Any:
        """See `Drafter`."""
        raise NotImplementedError

    def propose(
        self,
        target: EmbeddingAndHead,
        cache: Any,
        anchors: jax.Array,
        positions: jax.Array,
        uniforms: jax.Array,
        sampling: Sampling,
    ) -> tuple[Proposal, Any]:
        """See `Drafter`."""
        raise NotImplementedError


def is_confident(drafter: Drafter) -> bool:
    """Whether a drafter has a confidence head."""
    return getattr(drafter, "confidence", None) is not None
