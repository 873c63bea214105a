"""The parallel backbone (paper 3.1; DFlash): one pass over a block of masks, reading the target's features."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.convolution import BlockConvolution
from dspark_jax.ops.block_attention import block_attention
from dspark_jax.ops.cached_attention import Rows, cached_attention
from dspark_jax.sharding import constrain
from dspark_jax.target.cache import KVCache
from dspark_jax.target.layers import Attention, Layer, dense, layer_at, narrow, normal, ones, rms_norm, run_layers


class Backbone(nnx.Module):
    """Draft layers whose keys and values are those of the context features followed by the block's own.

    The context is projected and normed once, `hidden_norm(fc(features))`, and shared by all layers; it does not pass
    the layers' input norm, the block's stream does (trap 12). Rows attend to the context strictly before their anchor
    and, in both directions, to their own block (trap 3). There may be convolutions along the rows of a block around
    attention and MLP (`drafter/convolution.py`); the context passes none.
    """

    def __init__(self, arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs):
        d, scale = arch.hidden_size, config.initializer_range
        self.arch = arch
        self.num_layers = config.num_layers
        width = len(config.target_layer_ids) * d
        self.fc = normal(rngs, (), (width, d), ("features", "embed"), scale)
        self.hidden_norm = ones((), d)
        around, stack = (_convolution(d, config), _convolution(d, config)), (config.num_layers,)
        self.layers = Layer(arch, stack=stack, scale=scale, rngs=rngs, around=around)
        self.layers.attention.reads_context = True
        self.norm = ones((), d)

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `target.decode_weights`."""
        del join
        narrow(self.fc, dtype)

    def context(self, features: jax.Array) -> jax.Array:
        """Target features [B, S, M*D] -> context states [B, S, D]."""
        return rms_norm(dense(features, self.fc[...]), self.hidden_norm[...], self.arch.rms_norm_eps)

    def __call__(
        self,
        embedded: jax.Array,
        features: jax.Array,
        anchors: jax.Array,
        keep: jax.Array,
        starts: jax.Array | None = None,
    ) -> jax.Array:
        """Training pass over A blocks per sequence.

        Args:
          embedded: [B, A, G, D] embedded block inputs (anchor token, then masks).
          features: [B, S, M*D] target features; rows at and after an anchor are invisible to its block.
          anchors: [B, A] positions.
          keep: [B, A] bool, False for dummy blocks.
          starts: [B, S] first row of each row's document, where several are packed into a row.

        Returns:
          [B, A, G, D] after the final norm.
        """
        context = self.context(features.astype(embedded.dtype))
        starts = jnp.zeros(features.shape[:2], jnp.int32) if starts is None else starts
        positions = jnp.arange(features.shape[1]) - starts
        first = jnp.take_along_axis(starts, anchors, axis=1)  # [B, A]

        def layer(x: jax.Array, index: int) -> jax.Array:
            at = layer_at(self.layers, index)
            return self._layer(at, x, at.attention.keys_values(context, positions), anchors, keep, first)

        x = embedded
        # Few layers, and one by one they save a loop's stacking of residuals; the backward recomputes each.
        for index in range(self.num_layers):
            x = jax.checkpoint(layer, static_argnums=1)(x, index)
        return rms_norm(x, self.norm[...], self.arch.rms_norm_eps)

    def _layer(
        self,
        layer: Layer,
        x: jax.Array,
        context: tuple[jax.Array, jax.Array],
        anchors: jax.Array,
        keep: jax.Array,
        starts: jax.Array,
    ) -> jax.Array:
        """One layer over blocks x [B, A, G, D] with the context's keys and values [B, S, K, H]; starts is [B, A]."""
        b, a, g, d = x.shape
        positions = ((anchors - starts)[:, :, None] + jnp.arange(g)).reshape(b, a * g)

        def split(rows: jax.Array) -> jax.Array:
            return rows.reshape(b, a, g, *rows.shape[2:])

        def attention(projections: Attention, normed: jax.Array) -> jax.Array:
            query, key, value = projections.all(normed, positions)
            out = block_attention(
                split(query), *context, split(key), split(value), anchors, keep, starts, scale=projections.shape.scale
            )
            return out.reshape(query.shape)

        x = layer(x.reshape(b, a * g, d), attention)
        return constrain(x, "batch", None, None).reshape(b, a, g, d)

    def init_cache(self, batch: int, length: int, dtype: Any) -> KVCache:
        """An empty cache of projected context keys and values."""
        separate = getattr(self, "separate_caches", False)
        return KVCache.zeros(self.num_layers, batch, length, self.arch, dtype, separate=separate)

    def extend(self, cache: KVCache, features: jax.Array, positions: jax.Array) -> KVCache:
        """Writes the context rows of features [B, T, M*D] at positions [B, T] (consecutive) into every layer."""
        context = self.context(features)

        def body(cache: KVCache, index: jax.Array | int) -> KVCache:
            key, value = layer_at(self.layers, index).attention.keys_values(context, positions)
            return cache.write(index, key, value, positions[:, 0])

        return run_layers(body, cache, 0, self.num_layers, one_by_one=True)

    def decode(self, embedded: jax.Array, cache: KVCache, anchors: jax.Array) -> tuple[jax.Array, KVCache]:
        """Decoding pass over one block per request: the training pass with A = 1 and the context from the cache.

        Args:
          embedded: [B, G, D].
          cache: context rows 0..anchors[b]-1 are read. The block's own keys and values are written after them, so
            there is room for G more, and overwritten by what is committed.
          anchors: [B] absolute positions.

        Returns:
          [B, G, D] after the final norm, and the cache.
        """
        b, g, _ = embedded.shape
        positions, rows = anchors[:, None] + jnp.arange(g), Rows.whole(anchors, g)

        def attention(projections: Attention, normed: jax.Array) -> jax.Array:
            nonlocal cache
            query, key, value = projections.all(normed, positions)
            cache = cache.write(index, key, value, anchors)
            heads = cached_attention(
                query.reshape(b * g, *query.shape[2:]),
                rows=rows,
                **cache.for_attention(index),
                scale=projections.shape.scale,
                causal=False,
                finite=True,
            )
            return heads.reshape(query.shape)

        x = embedded
        for index in range(self.num_layers):
            x = constrain(layer_at(self.layers, index)(x, attention), "batch", None, None)
        return rms_norm(x, self.norm[...], self.arch.rms_norm_eps), cache


def _convolution(width: int, config: DrafterConfig) -> BlockConvolution | None:
    """A stack of convolutions, if the config has such."""
    taps, group = config.conv_kernel_size, config.conv_group_size
    if not taps:
        return None
    return BlockConvolution(width, config.block_rows, taps=taps, group=group, stack=(config.num_layers,))
