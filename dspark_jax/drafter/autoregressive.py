"""Drafters that draft one token after another: what EAGLE-3 and MTP have in common.

Row t joins the target's feature of token t with the embedding of token t+1, at RoPE position t, and predicts token t+2
(trap 33). Where the target has not been yet, the drafter's own output takes the place of the feature: row t of step s
reads the output of step s-1, the embedding of token t+1+s and position t+s. It attends to the first-step rows up to t
and to its own rows of the steps 1..s, in training (training-time test) as in decoding.

Embeddings of committed tokens are tapped like features (layer id -1), so `extend` needs no target.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax import recompute
from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.blocks import Anchors, anchor_candidates
from dspark_jax.drafter.interface import BlockOutputs, DrafterModule, Proposal
from dspark_jax.ops.block_attention import block_attention
from dspark_jax.ops.cached_attention import Rows, cached_attention
from dspark_jax.ops.markov_sample import sample_chain
from dspark_jax.ops.sampling import Sampling
from dspark_jax.sharding import constrain
from dspark_jax.target.cache import KVCache
from dspark_jax.target.interface import EmbeddingAndHead
from dspark_jax.target.layers import layer_at, ones, rms_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCache:
    """Rows of committed tokens.

    Attributes:
      rows: keys and values; row t is that of token t's feature and token t+1's embedding.
      newest: [B, D] fused feature of the newest token that the target has seen; its row waits for the token after it.
    """

    rows: KVCache
    newest: jax.Array


class Autoregressive(DrafterModule):
    """One layer over rows of (feature, next token); subclasses say how a row is made.

    Their `layers` is a stack of one `target.layers.Layer`, which is given the residual and the attention's heads.
    Parameters are float32; `dtype` is the compute type.
    """

    layers: Any
    stops_drafting = True  # after a drafted stop token (trap 28)
    feeds_normed = False  # the next step reads the output after the final norm

    def __init__(self, arch: TargetArchitecture, config: DrafterConfig, *, dtype: Any = jnp.float32):
        """What does not depend on how a row is made; `layers` is up to the subclass."""
        self.arch = arch
        self.dtype = dtype
        self.block_size = config.block_size
        ids = tuple(config.target_layer_ids)
        self.taps = ids if ids[0] == -1 else (-1, *ids)
        self.feature_width = len(ids) * arch.hidden_size
        self.norm = ones((), arch.hidden_size)

    def fuse(self, features: jax.Array) -> jax.Array:
        """Tapped features [..., M*D] without the added embeddings -> [..., D], what a first row reads."""
        raise NotImplementedError

    def join(self, layer: Any, embedded: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embedding of the next token and feature (or last output), [..., D] -> attention input, residual [..., D]."""
        raise NotImplementedError

    def supervised(self, loss_mask: jax.Array, starts: jax.Array) -> jax.Array:
        """Rows whose first step is supervised.

        Row t predicts token t+2, the first label of an anchor at t+1: the rule is that of `blocks.block_targets` with
        one position. So the last prompt token, which drafts after the first answer token, is such a row, and no label
        is outside the answer, its document or the sequence.

        Args:
          loss_mask: [B, S], 1 on supervised tokens.
          starts: [B, S] first row of each row's document.

        Returns:
          [B, S] bool.
        """
        ahead = anchor_candidates(loss_mask)[:, 1:-1] & (starts[:, 2:] == starts[:, :-2])
        return jnp.pad(ahead, ((0, 0), (0, 2)))

    def __call__(
        self,
        target: EmbeddingAndHead,
        features: jax.Array,
        tokens: jax.Array,
        loss_mask: jax.Array,
        anchors: Anchors,
        starts: jax.Array | None = None,
    ) -> BlockOutputs:
        """Training pass: G steps over every row, or over the rows at the anchors if there are fewer than S of those.

        Step s of row t is supervised where row t+s of the same document is, see `supervised`. The embeddings before the
        features are not looked at. For the arguments see `drafter.interface.DrafterModule`.
        """
        b, s = tokens.shape
        starts = jnp.zeros((b, s), jnp.int32) if starts is None else starts
        everywhere = anchors.positions.shape[1] >= s
        rows = jnp.broadcast_to(jnp.arange(s), (b, s)) if everywhere else anchors.positions
        keep = jnp.ones((b, s), bool) if everywhere else anchors.keep
        first = jnp.take_along_axis(starts, rows, axis=1)

        def at(values: jax.Array, shift: int) -> jax.Array:
            """[B, S, ...] -> [B, A, ...] at rows + shift; clamped, where only unsupervised rows ask."""
            index = jnp.minimum(rows + shift, s - 1)
            return jax.vmap(lambda one, i: one[i])(values, index)

        layer = layer_at(self.layers, 0)
        fused = self.fuse(features[..., -self.feature_width :].astype(self.dtype))
        embedded = target.embed(tokens).astype(self.dtype)
        following = jnp.concatenate([embedded[:, 1:], embedded[:, -1:]], axis=1)
        context_key, context_value = layer.attention.keys_values(
            self.join(layer, following, fused)[0], jnp.arange(s) - starts
        )

        def step(carry: tuple[jax.Array, list[jax.Array], list[jax.Array]], k: int) -> Any:
            hidden, keys, values = carry
            normed, residual = self.join(layer, at(embedded, k + 1), hidden)
            query, key, value = layer.attention.all(normed, rows - first + k)
            keys, values = [*keys, key], [*values, value]
            heads = block_attention(
                query[:, :, None],
                context_key,
                context_value,
                jnp.stack(keys, axis=2),
                jnp.stack(values, axis=2),
                rows,
                keep,
                first,
                scale=layer.attention.shape.scale,
            )[:, :, 0]
            hidden = layer(residual, lambda *_: heads)
            return constrain(hidden, "batch", None, None), keys, values

        carry, outputs = (at(fused, 0), [], []), []
        for k in range(self.block_size):
            carry = recompute.layer(step)(carry, k)
            outputs.append(rms_norm(carry[0], self.norm[...], self.arch.rms_norm_eps))
            if self.feeds_normed:
                carry = outputs[-1], *carry[1:]
        useful = self.supervised(loss_mask, starts)
        steps = range(self.block_size)
        masks = [at(useful, k) & (rows + k < s) & (at(starts, k) == first) & keep for k in steps]
        return BlockOutputs(
            hidden=jnp.stack(outputs, axis=2),
            prev_tokens=jnp.stack([at(tokens, k + 1) for k in steps], axis=2),
            labels=jnp.stack([at(tokens, k + 2) for k in steps], axis=2),
            teacher_rows=jnp.stack([jnp.minimum(rows + k + 1, s - 1) for k in steps], axis=2),
            mask=jnp.stack(masks, axis=2),
        )

    def init_cache(self, batch: int, length: int) -> RowCache:
        """An empty cache for `length` positions of `batch` requests."""
        rows = KVCache.zeros(1, batch, length, self.arch, self.dtype)
        return RowCache(rows, jnp.zeros((batch, self.arch.hidden_size), self.dtype))

    def extend(
        self, cache: RowCache, features: jax.Array, tokens: jax.Array, positions: jax.Array, counts: jax.Array
    ) -> RowCache:
        """Extends the cache by committed tokens; see `drafter.interface.Drafter`.

        Token by token, the row of the feature before it is completed; the feature of the last one waits for the token
        that the next round starts from. Rows at and after counts[b] are written too; the next call overwrites them
        before they can be seen.
        """
        del tokens
        features = features.astype(self.dtype)
        fused = self.fuse(features[..., -self.feature_width :])
        first = positions[:, 0]
        fresh = (first == 0).astype(jnp.int32)  # no row comes before the first token
        index = jnp.arange(features.shape[1]) + fresh[:, None]

        def pick(values: jax.Array) -> jax.Array:
            return jnp.take_along_axis(values, index[..., None], axis=1)

        hidden = pick(jnp.concatenate([cache.newest[:, None], fused], axis=1))
        embedded = features[..., : self.arch.hidden_size]
        following = pick(jnp.concatenate([embedded, embedded[:, -1:]], axis=1))
        layer = layer_at(self.layers, 0)
        normed = self.join(layer, following, hidden)[0]
        key, value = layer.attention.keys_values(normed, first[:, None] - 1 + index)
        last = jnp.take_along_axis(fused, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        newest = jnp.where((counts > 0)[:, None], last, cache.newest)
        return RowCache(cache.rows.write(0, key, value, first - 1 + fresh), newest)

    def propose(
        self,
        target: EmbeddingAndHead,
        cache: RowCache,
        anchors: jax.Array,
        positions: jax.Array,
        uniforms: jax.Array,
        sampling: Sampling,
    ) -> tuple[Proposal, RowCache]:
        """Drafts G tokens after each anchor; see `drafter.interface.Drafter`.

        The rows of the drafts are written after those of the committed tokens, and see all before them.
        """
        layer = layer_at(self.layers, 0)
        start = positions - 1  # the row of the newest feature and the anchor
        unembed = target.unembed if self.vocabulary is None else self.vocabulary.unembed

        def step(k: int, state: Any, previous: jax.Array) -> tuple[jax.Array, Any]:
            hidden, rows = state
            embedded = target.embed(previous[:, None]).astype(self.dtype)
            normed, residual = self.join(layer, embedded, hidden)
            query, key, value = layer.attention.all(normed, (start + k)[:, None])
            rows = rows.write(0, key, value, start + k)
            scale, last = layer.attention.shape.scale, Rows.whole(start + k, 1)
            heads = cached_attention(query[:, 0], rows=last, **rows.for_attention(0), scale=scale, finite=True)
            hidden = layer(residual, lambda *_: heads[:, None])
            normed = rms_norm(hidden, self.norm[...], self.arch.rms_norm_eps)
            return unembed(normed[:, 0]), (normed if self.feeds_normed else hidden, rows)

        start_of_all = (cache.newest[:, None], cache.rows)
        draws = uniforms.swapaxes(0, 1)
        tokens, logits, (_, rows) = sample_chain(step, start_of_all, anchors, draws, sampling)
        proposal = Proposal(tokens.T, logits.swapaxes(0, 1), None)
        return proposal, dataclasses.replace(cache, rows=rows)
