"""EAGLE-3: several taps, one layer, its own outputs fed back (training-time test).

As the reference trains it the layer is the target's family's (Qwen3's, with norms of queries and keys) and head and
vocabulary are the target's. As it is served elsewhere the layer is Llama's (`drafter.qk_norms` off), and it drafts from
a part of the vocabulary with a head of its own (`drafter.draft_vocab_size`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.autoregressive import Autoregressive
from dspark_jax.drafter.vocabulary import DraftVocabulary
from dspark_jax.target.families.family import AttentionShape
from dspark_jax.target.layers import Attention, Layer, dense, drafter_layer, narrow, normal, ones, rms_norm


class WideAttention(Attention):
    """Attention projections that read 2 D inputs: embedding and feature side by side."""

    def __init__(
        self, arch: TargetArchitecture, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs, shape: AttentionShape
    ):
        """As `Attention`; the output is D wide."""
        super().__init__(arch, stack=stack, scale=scale, rngs=rngs, shape=shape)
        d, n, k, h = 2 * arch.hidden_size, self.shape.heads, self.shape.kv_heads, self.shape.width
        self.query = normal(rngs, stack, (d, n, h), ("embed", "heads", "head_width"), scale)
        self.key = normal(rngs, stack, (d, k, h), ("embed", "kv_heads", "head_width"), scale)
        if self.value is not None:
            self.value = normal(rngs, stack, (d, k, h), ("embed", "kv_heads", "head_width"), scale)


class Eagle3Layer(Layer):
    """A layer whose attention reads [norm(embedding); norm(feature)] and whose residual is the feature."""

    def __init__(
        self, arch: TargetArchitecture, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs, qk_norms: bool = True
    ):
        """As `Layer`; without `qk_norms`, queries and keys pass no norm even if they do in the target's layers."""
        arch, shape = drafter_layer(arch)
        attention = dataclasses.replace(shape.attention, norms=shape.attention.norms and qk_norms)
        shape = dataclasses.replace(shape, attention=attention)
        super().__init__(arch, stack=stack, scale=scale, rngs=rngs, shape=shape)
        self.attention = WideAttention(arch, stack=stack, scale=scale, rngs=rngs, shape=attention)
        self.hidden_norm = ones(stack, arch.hidden_size)


class Eagle3(Autoregressive):
    """EAGLE-3: `block_size` steps of training-time test, and as many drafts per round."""

    def __init__(self, arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        """A random drafter."""
        super().__init__(arch, config, dtype=dtype)
        d, taps, scale = arch.hidden_size, len(config.target_layer_ids), config.initializer_range
        norms = config.eagle3_norms
        self.fc = normal(rngs, (), (taps * d, d), ("features", "embed"), scale)
        self.layers = Eagle3Layer(arch, stack=(1,), scale=scale, rngs=rngs, qk_norms=config.qk_norms)
        self.layers.attention.reads_context = True
        self.norms_residual, self.feeds_normed = "norm_before_residual" in norms, "norm_output" in norms
        self.input_norm: Any = ones((), taps * d) if "norm_before_fc" in norms else None
        self.fc_norm: Any = ones((taps,), d) if "fc_norm" in norms else None
        if config.draft_vocab_size:
            self.vocabulary = DraftVocabulary(arch, config, rngs=rngs)

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `target.decode_weights`."""
        del join
        narrow(self.fc, dtype)

    def fuse(self, features: jax.Array) -> jax.Array:
        """See `Autoregressive.fuse`; a linear map without bias, after the norms that it has."""
        eps = self.arch.rms_norm_eps
        if self.input_norm is not None:
            features = rms_norm(features, self.input_norm[...], eps)
        if self.fc_norm is not None:
            weight = self.fc_norm[...]  # [M, D]
            each = features.reshape(*features.shape[:-1], *weight.shape)
            features = rms_norm(each, weight, eps).reshape(features.shape)
        return dense(features, self.fc[...])

    def join(self, layer: Any, embedded: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Autoregressive.join`; the attention input is 2 D wide."""
        eps = self.arch.rms_norm_eps
        normed = rms_norm(embedded, layer.attention_norm[...], eps), rms_norm(hidden, layer.hidden_norm[...], eps)
        return jnp.concatenate(normed, axis=-1), normed[1] if self.norms_residual else hidden

    def supervised(self, loss_mask: jax.Array, starts: jax.Array) -> jax.Array:
        """See `Autoregressive.supervised`; the reference's rule (golden.md D.12).

        Token t is supervised, and is not the last one of its document that is: in the first step, the first two tokens
        of an answer are never targets, and the token after it is one.
        """
        supervised, length = loss_mask.astype(bool), loss_mask.shape[1]
        index = jnp.where(supervised, jnp.arange(length), length)
        following = jax.lax.cummin(index, axis=1, reverse=True)
        following = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=length)
        same = jnp.take_along_axis(starts, jnp.minimum(following, length - 1), axis=1) == starts
        return supervised & (following < length) & same
