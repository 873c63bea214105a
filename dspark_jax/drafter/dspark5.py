"""DSpark-5, the drafter inside DeepSeek-V4's checkpoints (`mtp.*`): DSpark with that model's layers.

The draft layers are mixtures of experts with hyper-connections (`target.hyper_connections`), and attend to the last W
rows of the context, W = `drafter.sliding_window`, and in both directions to their block (`drafter.shared_key`). What
the confidence head reads is the collapsed streams before the final norm. The context is projected and normed once and
passes no norm of the layers, as in `drafter.backbone`. For a DeepSeek-V4 a tapped feature is the mean of its streams;
of any other target it is the layer's output, as for all drafters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax import recompute
from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.dspark import DSpark
from dspark_jax.drafter.heads import ConfidenceHead
from dspark_jax.drafter.shared_key import SharedKeyAttention
from dspark_jax.layer_sizes import LayerSizes, layer_sizes
from dspark_jax.sharding import constrain
from dspark_jax.target.experts import Experts
from dspark_jax.target.families.family import ExpertShape, HyperShape
from dspark_jax.target.hyper_connections import HyperConnection, HyperHead, streams_of
from dspark_jax.target.layers import dense, layer_at, narrow, normal, ones, rms_norm


class StreamLayer(nnx.Module):
    """Attention and a mixture, each between two hyper-connections; a stack by a leading axis on every parameter."""

    def __init__(
        self, arch: TargetArchitecture, sizes: LayerSizes, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs
    ):
        how: dict[str, Any] = {"stack": stack, "scale": scale, "rngs": rngs}
        streams = HyperShape(sizes.hc_mult, sizes.hc_sinkhorn_iters, sizes.hc_eps)
        self.attention_streams = HyperConnection(arch, streams, **how)
        self.attention_norm = ones(stack, arch.hidden_size)
        self.attention = SharedKeyAttention(arch, sizes, **how)
        self.mlp_streams = HyperConnection(arch, streams, **how)
        self.mlp_norm = ones(stack, arch.hidden_size)
        self.mlp = Experts(arch, _experts(sizes), **how)
        self.mlp.trained = True
        self.eps = arch.rms_norm_eps

    def __call__(self, streams: jax.Array, context: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        """One layer over the rows of blocks.

        Args:
          streams: [..., G, N, D].
          context: [..., W, H] keys of context rows.
          seen: [..., W] bool, those of them that there are.
          positions: [..., G] of the rows.

        Returns:
          [..., G, N, D].
        """

        def attend(x: jax.Array) -> jax.Array:
            own = self.attention.own(rms_norm(x, self.attention_norm[...], self.eps), positions)
            keys = jnp.concatenate([context.astype(own.row.dtype), own.row], axis=-2)
            visible = jnp.concatenate([seen, jnp.ones(own.row.shape[:-1], bool)], axis=-1)
            return self.attention.block_output(self.attention.heads(own.query, keys, visible), positions)

        streams = self.attention_streams.around(streams, attend)
        return self.mlp_streams.around(streams, lambda x: self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)))


def _experts(sizes: LayerSizes) -> ExpertShape:
    """The mixture of a layer: a learned router, and a shared expert as wide as the others."""
    return ExpertShape(
        sizes.n_routed_experts,
        sizes.num_experts_per_tok,
        sizes.moe_intermediate_size,
        normalised=True,
        scores="sqrtsoftplus",
        factor=sizes.routed_scaling_factor,
        corrected=True,
        limit=sizes.swiglu_limit,
        shared=sizes.moe_intermediate_size,
    )


class StreamBackbone(nnx.Module):
    """The draft layers with what is before and after them; in the place of `drafter.backbone.Backbone`."""

    def __init__(self, arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs):
        d, scale, sizes = arch.hidden_size, config.initializer_range, layer_sizes(arch, config.layer_sizes)
        self.num_layers, self.window, self.width = config.num_layers, config.sliding_window, sizes.head_dim
        self.streams = HyperShape(sizes.hc_mult, sizes.hc_sinkhorn_iters, sizes.hc_eps)
        self.fc = normal(rngs, (), (len(config.target_layer_ids) * d, d), ("features", "embed"), scale)
        self.hidden_norm = ones((), d)
        self.layers = StreamLayer(arch, sizes, stack=(config.num_layers,), scale=scale, rngs=rngs)
        self.collapse = HyperHead(arch, self.streams, scale=scale, rngs=rngs)
        self.norm = ones((), d)
        self.eps = arch.rms_norm_eps

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `target.decode_weights`."""
        del join
        narrow(self.fc, dtype)

    def context(self, features: jax.Array) -> jax.Array:
        """Target features [B, S, M*D] -> context states [B, S, D]."""
        return rms_norm(dense(features, self.fc[...]), self.hidden_norm[...], self.eps)

    def normed(self, collapsed: jax.Array) -> jax.Array:
        """What the LM head reads of the collapsed streams [..., D]."""
        return rms_norm(collapsed, self.norm[...], self.eps)

    def __call__(
        self, embedded: jax.Array, features: jax.Array, anchors: jax.Array, starts: jax.Array | None = None
    ) -> jax.Array:
        """Training pass over A blocks per sequence.

        Args:
          embedded: [B, A, G, D] embedded block inputs (anchor token, then masks).
          features: [B, S, M*D] target features; rows at and after an anchor are invisible to its block.
          anchors: [B, A] positions.
          starts: [B, S] first row of each row's document, where several are packed into a row.

        Returns:
          The collapsed streams [B, A, G, D] before the final norm.
        """
        context = self.context(features.astype(embedded.dtype))
        starts = jnp.zeros(features.shape[:2], jnp.int32) if starts is None else starts
        rows = jnp.arange(features.shape[1]) - starts
        first = jnp.take_along_axis(starts, anchors, axis=1)  # [B, A]
        at = anchors[..., None] + jnp.arange(-self.window, 0)  # [B, A, W]
        seen, at = at >= first[..., None], jnp.maximum(at, 0)
        positions = (anchors - first)[..., None] + jnp.arange(embedded.shape[2])

        def layer(streams: jax.Array, index: int) -> jax.Array:
            one = layer_at(self.layers, index)
            window = jax.vmap(lambda keys, rows: keys[rows])(one.attention.keys(context, rows), at)
            return constrain(one(streams, window, seen, positions), "batch", *(None,) * 4)

        streams = streams_of(embedded, self.streams)
        for index in range(self.num_layers):
            streams = recompute.layer(layer)(streams, index)
        return self.collapse(streams)

    def init_cache(self, batch: int, length: int, dtype: Any) -> jax.Array:
        """An empty cache [L, B, C, H] of the context's keys for C = `length` positions."""
        return constrain(jnp.zeros((self.num_layers, batch, length, self.width), dtype), None, "batch", None, None)

    def extend(self, cache: jax.Array, features: jax.Array, positions: jax.Array) -> jax.Array:
        """Writes the context rows of features [B, T, M*D] at positions [B, T] (consecutive) into every layer."""
        context = self.context(features)
        keys = [layer_at(self.layers, index).attention.keys(context, positions) for index in range(self.num_layers)]
        put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1), (1, 1, 0), 1)
        return constrain(put(cache, jnp.stack(keys).astype(cache.dtype), positions[:, 0]), None, "batch", None, None)

    def decode(self, embedded: jax.Array, cache: jax.Array, anchors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decoding pass over one block per request: the training pass with A = 1 and the context from the cache.

        Args:
          embedded: [B, G, D].
          cache: context rows before the anchors are read.
          anchors: [B] absolute positions.

        Returns:
          [B, G, D] after the final norm, and the cache.
        """
        return self.normed(self.collapsed(embedded, cache, anchors)), cache

    def collapsed(self, embedded: jax.Array, cache: jax.Array, anchors: jax.Array) -> jax.Array:
        """`decode` before the final norm."""
        at = anchors[:, None] + jnp.arange(-self.window, 0)  # [B, W]
        seen, at = at >= 0, jnp.maximum(at, 0)
        positions, streams = anchors[:, None] + jnp.arange(embedded.shape[1]), streams_of(embedded, self.streams)
        for index in range(self.num_layers):
            window = jnp.take_along_axis(cache[index], at[..., None], axis=1)
            streams = layer_at(self.layers, index)(streams, window, seen, positions)
            streams = constrain(streams, "batch", None, None, None)
        return self.collapse(streams)


class DSpark5(DSpark):
    """A block drafter with DeepSeek-V4's layers. Parameters are float32; `dtype` is the compute type."""

    backbone: Any

    def make_backbone(self, arch: TargetArchitecture, config: DrafterConfig, rngs: nnx.Rngs) -> StreamBackbone:
        """See `DSpark`."""
        return StreamBackbone(arch, config, rngs=rngs)

    def make_confidence(self, arch: TargetArchitecture, config: DrafterConfig, rngs: nnx.Rngs) -> ConfidenceHead:
        """See `DSpark`: one that has no offset."""
        scale = config.initializer_range
        return ConfidenceHead(arch.hidden_size, config.markov_rank, scale=scale, rngs=rngs, offset=False)

    def train_states(self, embedded: jax.Array, features: jax.Array, anchors: Any, starts: Any) -> Any:
        """See `DSpark`."""
        collapsed = self.backbone(embedded, features, anchors.positions, starts)
        return self.backbone.normed(collapsed), collapsed

    def decode_states(self, embedded: jax.Array, cache: Any, positions: jax.Array) -> Any:
        """See `DSpark`."""
        collapsed = self.backbone.collapsed(embedded, cache, positions)
        return self.backbone.normed(collapsed), collapsed, cache

    def extend(
        self, cache: Any, features: jax.Array, tokens: jax.Array, positions: jax.Array, counts: jax.Array
    ) -> Any:
        """Extends the cache by committed tokens; see `drafter.interface.Drafter`.

        Rows at and after counts[b] may be written too; the next call overwrites them before a block can see them.
        """
        del tokens, counts
        return self.backbone.extend(cache, features.astype(self.dtype), positions)
