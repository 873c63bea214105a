"""The parallel backbone (paper 3.1; DFlash): one pass over a block of masks, reading the target's features."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax import recompute
from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.convolution import BlockConvolution
from dspark_jax.ops.block_attention import block_attention
from dspark_jax.ops.cached_attention import Rows, cached_attention
from dspark_jax.rope_scaling import scaled
from dspark_jax.sharding import constrain
from dspark_jax.target.cache import KVCache
from dspark_jax.target.families.family import FULL, SLIDING, LayerShape
from dspark_jax.target.layers import Attention, Layer, dense, drafter_layer, layer_at, narrow, normal, ones, rms_norm


class Backbone(nnx.Module):
    """Draft layers whose keys and values are those of the context features followed by the block's own.

    The context is projected and normed once, `hidden_norm(fc(features))`, and shared by all layers; it does not pass
    the layers' input norm, the block's stream does (trap 12). Rows attend to the context strictly before their anchor
    and, in both directions, to their own block (trap 3). There may be convolutions along the rows of a block around
    attention and MLP (`drafter/convolution.py`); the context passes none.

    Layers with a window of W rows see the last W - 1 rows of the context only; all rows of a block alike, and each
    other, as in layers without one (trap 37).
    """

    def __init__(self, arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs):
        d, scale = arch.hidden_size, config.initializer_range
        self.arch = arch
        self.num_layers = config.num_layers
        width = len(config.target_layer_ids) * d
        self.fc = normal(rngs, (), (width, d), ("features", "embed"), scale)
        self.hidden_norm = ones((), d)
        around, stack = (_convolution(d, config), _convolution(d, config)), (config.num_layers,)
        self.kinds, self.window, self.rows = config.layer_kinds, config.sliding_window, config.block_rows
        layers, shape = _layer_shape(arch, config)
        self.layers = Layer(layers, stack=stack, scale=scale, rngs=rngs, shape=shape, around=around)
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

        seen = {FULL: first, SLIDING: jnp.maximum(first, anchors - self.window + 1)}

        def layer(x: jax.Array, index: int) -> jax.Array:
            at, since = layer_at(self.layers, index), seen[self.kinds[index]]
            return self._layer(at, x, at.attention.keys_values(context, positions), anchors, keep, first, since)

        x = embedded
        # Few layers, and one by one they save a loop's stacking of residuals.
        for index in range(self.num_layers):
            x = recompute.layer(layer)(x, index)
        return rms_norm(x, self.norm[...], self.arch.rms_norm_eps)

    def _layer(
        self,
        layer: Layer,
        x: jax.Array,
        context: tuple[jax.Array, jax.Array],
        anchors: jax.Array,
        keep: jax.Array,
        starts: jax.Array,
        since: jax.Array,
    ) -> jax.Array:
        """One layer over blocks x [B, A, G, D] with the context's keys and values [B, S, K, H].

        `starts` and `since` [B, A] are the first rows of the anchors' documents, and those that the blocks see.
        """
        b, a, g, d = x.shape
        positions = ((anchors - starts)[:, :, None] + jnp.arange(g)).reshape(b, a * g)

        def split(rows: jax.Array) -> jax.Array:
            return rows.reshape(b, a, g, *rows.shape[2:])

        def attention(projections: Attention, normed: jax.Array) -> jax.Array:
            query, key, value = projections.all(normed, positions)
            out = block_attention(
                split(query), *context, split(key), split(value), anchors, keep, since, scale=projections.shape.scale
            )
            return out.reshape(query.shape)

        x = layer(x.reshape(b, a * g, d), attention)
        return constrain(x, "batch", None, None).reshape(b, a, g, d)

    def init_cache(self, batch: int, length: int, dtype: Any) -> dict[str, KVCache]:
        """Empty caches of projected context keys and values, by kind of layers; a ring where there is a window.

        The most rows that are written at once for nothing are those of a block, or of a round's rejected drafts.
        """
        separate, shape = getattr(self, "separate_caches", False), drafter_layer(self.arch)[1].attention

        def cache(kind: str) -> KVCache:
            window = self._rows_seen(kind)
            own, count = dataclasses.replace(shape, window=window), self.kinds.count(kind)
            block = self.rows + 1 if window else 0
            return KVCache.zeros(count, batch, length, self.arch, dtype, own, separate=separate, block=block)

        return {kind: cache(kind) for kind in sorted(set(self.kinds))}

    def extend(
        self, cache: dict[str, KVCache], features: jax.Array, positions: jax.Array, counts: jax.Array
    ) -> dict[str, KVCache]:
        """Writes the context rows of features [B, T, M*D] at positions [B, T] (consecutive) into every layer.

        Of more rows than a ring takes at once only the first counts [B] are written.
        """
        context, cache = self.context(features), dict(cache)
        for index, kind in enumerate(self.kinds):
            key, value = layer_at(self.layers, index).attention.keys_values(context, positions)
            part, at = cache[kind], self._number(index)
            many = part.front and features.shape[1] > part.front
            more = (counts,) if many else ()
            cache[kind] = (part.write_last if many else part.write)(at, key, value, positions[:, 0], *more)
        return cache

    def _number(self, index: int) -> int:
        """The number of a layer among those of its kind."""
        return self.kinds[:index].count(self.kinds[index])

    def _rows_seen(self, kind: str) -> int:
        """What rows of a block see in a cache, back from the block's last row; 0 = everything."""
        return self.window + self.rows - 1 if kind == SLIDING else 0

    def decode(
        self, embedded: jax.Array, cache: dict[str, KVCache], anchors: jax.Array
    ) -> tuple[jax.Array, dict[str, KVCache]]:
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
        positions, rows, cache = anchors[:, None] + jnp.arange(g), Rows.whole(anchors, g), dict(cache)

        def attention(projections: Attention, normed: jax.Array) -> jax.Array:
            query, key, value = projections.all(normed, positions)
            kind, at = self.kinds[index], self._number(index)
            part = cache[kind] = cache[kind].write(at, key, value, anchors)
            heads = cached_attention(
                query.reshape(b * g, *query.shape[2:]),
                rows=rows,
                **part.for_attention(at),
                scale=projections.shape.scale,
                window=self._rows_seen(kind),
                front=part.front,
                causal=False,
                finite=True,
            )
            return heads.reshape(query.shape)

        x = embedded
        for index in range(self.num_layers):
            x = constrain(layer_at(self.layers, index)(x, attention), "batch", None, None)
        return rms_norm(x, self.norm[...], self.arch.rms_norm_eps), cache


def _layer_shape(arch: TargetArchitecture, config: DrafterConfig) -> tuple[TargetArchitecture, LayerShape]:
    """`drafter_layer` with the RoPE of a config."""
    layers, shape = drafter_layer(arch)
    if config.rope_type == "default":
        return layers, shape
    attention = shape.attention
    turns, factor = scaled(config.rope_type, config.rope_scaling, attention.width, attention.theta)
    # Queries and keys are both multiplied with the factor, which their product can be as well.
    attention = dataclasses.replace(attention, turns=turns, scale=attention.scale * factor**2)
    return layers, dataclasses.replace(shape, attention=attention)


def _convolution(width: int, config: DrafterConfig) -> BlockConvolution | None:
    """A stack of convolutions, if the config has such."""
    taps, group = config.conv_kernel_size, config.conv_group_size
    if not taps:
        return None
    return BlockConvolution(width, config.block_rows, taps=taps, group=group, stack=(config.num_layers,))
