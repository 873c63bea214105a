"""DSpark (paper section 3): the parallel backbone, a sequential head and the confidence head.

DFlash is the same drafter without the heads; DFlash 2 has convolutions and the selector (`heads/selector.py`). The
embedding and the LM head belong to the target, which every method that needs them takes as an argument.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.backbone import Backbone
from dspark_jax.drafter.blocks import Anchors, block_targets, block_tokens
from dspark_jax.drafter.heads import HEADS, ConfidenceHead
from dspark_jax.drafter.interface import BlockOutputs, DrafterModule, Proposal
from dspark_jax.ops.sampling import Sampling, sample
from dspark_jax.registry import find
from dspark_jax.target.cache import KVCache
from dspark_jax.target.interface import EmbeddingAndHead


class DSpark(DrafterModule):
    """A block drafter for one target. Parameters are float32; `dtype` is the compute type."""

    def __init__(self, arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        rank = config.markov_rank
        self.block_size, self.rows = config.block_size, config.block_rows
        self.taps = tuple(config.target_layer_ids)
        self.mask_token = config.mask_token_id
        self.dtype = dtype
        self.backbone = self.make_backbone(arch, config, rngs)
        if rank:
            head = find(HEADS, config.markov_head_type, "drafter.markov_head_type").load()
            self.markov = head.of(arch, config, rngs=rngs)
        if config.confidence_head:
            self.confidence = self.make_confidence(arch, config, rngs)

    def make_backbone(self, arch: TargetArchitecture, config: DrafterConfig, rngs: nnx.Rngs) -> Any:
        """A random backbone."""
        return Backbone(arch, config, rngs=rngs)

    def make_confidence(self, arch: TargetArchitecture, config: DrafterConfig, rngs: nnx.Rngs) -> ConfidenceHead:
        """A random confidence head."""
        seen = config.markov_rank if config.confidence_with_markov else 0
        return ConfidenceHead(arch.hidden_size, seen, scale=config.initializer_range, rngs=rngs)

    def __call__(
        self,
        target: EmbeddingAndHead,
        features: jax.Array,
        tokens: jax.Array,
        loss_mask: jax.Array,
        anchors: Anchors,
        starts: jax.Array | None = None,
    ) -> BlockOutputs:
        """Training pass; see `drafter.interface.DrafterModule`."""
        targets = block_targets(tokens, loss_mask, anchors, self.block_size)
        embedded = target.embed(block_tokens(targets.prev_tokens[:, :, 0], self.mask_token, self.rows))
        states, trusted = self.train_states(embedded.astype(self.dtype), features, anchors, starts)
        hidden, trusted = self.predictions(states), None if trusted is None else self.predictions(trusted)
        return BlockOutputs(hidden, targets.prev_tokens, targets.labels, targets.teacher_rows, targets.mask, trusted)

    def train_states(
        self, embedded: jax.Array, features: jax.Array, anchors: Anchors, starts: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """States of all rows of blocks [B, A, R, D], and what the confidence head reads in their place, if anything."""
        return self.backbone(embedded, features, anchors.positions, anchors.keep, starts), None

    def decode_states(
        self, embedded: jax.Array, cache: Any, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """The same of one block per request, [B, R, D] each, and the cache."""
        states, cache = self.backbone.decode(embedded, cache, positions)
        return states, None, cache

    def predictions(self, states: jax.Array) -> jax.Array:
        """States of all rows of blocks -> [..., G, D], those that predict: all of them, or all but the anchor's."""
        return states[..., self.rows - self.block_size :, :]

    def init_cache(self, batch: int, length: int) -> dict[str, KVCache]:
        """An empty cache, by kind of layers, for `length` positions of `batch` requests."""
        return self.backbone.init_cache(batch, length, self.dtype)

    def extend(
        self, cache: dict[str, KVCache], features: jax.Array, tokens: jax.Array, positions: jax.Array, counts: jax.Array
    ) -> dict[str, KVCache]:
        """Extends the cache by committed tokens; see `drafter.interface.Drafter`.

        Rows at and after counts[b] may be written too; the next call overwrites them before a block can see them.
        """
        del tokens
        return self.backbone.extend(cache, features.astype(self.dtype), positions, counts)

    def propose(
        self,
        target: EmbeddingAndHead,
        cache: dict[str, KVCache],
        anchors: jax.Array,
        positions: jax.Array,
        uniforms: jax.Array,
        sampling: Sampling,
    ) -> tuple[Proposal, dict[str, KVCache]]:
        """Drafts G tokens after each anchor; see `drafter.interface.Drafter`."""
        embedded = target.embed(block_tokens(anchors, self.mask_token, self.rows)).astype(self.dtype)
        states, trusted, cache = self.decode_states(embedded, cache, positions)
        hidden = self.predictions(states)
        trusted = hidden if trusted is None else self.predictions(trusted)
        positions_first, draws = hidden.swapaxes(0, 1), uniforms.swapaxes(0, 1)
        base = target.unembed(positions_first)  # [G, B, V]
        if self.markov is None:
            tokens, logits = jax.vmap(sample, in_axes=(0, None, 0))(base, sampling, draws), base
        else:
            tokens, logits = self.markov.sample(base, positions_first, anchors, draws, sampling)
        tokens, logits, previous = tokens.T, logits.swapaxes(0, 1), None
        if self.markov is not None:
            previous = self.markov.embed(jnp.concatenate([anchors[:, None], tokens[:, :-1]], axis=1))
        confidence = None if self.confidence is None else self.confidence(trusted, previous)
        return Proposal(tokens, logits, confidence), cache
