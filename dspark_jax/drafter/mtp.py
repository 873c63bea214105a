"""MTP: a multi-token-prediction module in the form of DeepSeek-V3, the production baseline of the paper.

The module reads P [norm(h_t); norm(embedding of token t+1)], where h_t is the target's last hidden state before its
final norm, and is one ordinary transformer layer; norm and the target's LM head follow. With one draft per round
(block size 1) it is MTP-1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.autoregressive import Autoregressive
from dspark_jax.target.layers import Layer, dense, narrow, normal, ones, rms_norm


class MTP(Autoregressive):
    """One multi-token-prediction module; the only tap is the target's last layer."""

    def __init__(self, arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        """A random drafter."""
        super().__init__(arch, config, dtype=dtype)
        d, scale = arch.hidden_size, config.initializer_range
        self.hidden_norm = ones((), d)
        self.embedding_norm = ones((), d)
        self.projection = normal(rngs, (), (2 * d, d), ("features", "embed"), scale)
        self.layers = Layer(arch, stack=(1,), scale=scale, rngs=rngs)
        self.layers.attention.reads_context = True

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `target.decode_weights`."""
        del join
        narrow(self.projection, dtype)

    def fuse(self, features: jax.Array) -> jax.Array:
        """See `Autoregressive.fuse`: the hidden state as it is."""
        return features

    def join(self, layer: Any, embedded: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Autoregressive.join`; the projection is the residual."""
        eps = self.arch.rms_norm_eps
        normed = rms_norm(hidden, self.hidden_norm[...], eps), rms_norm(embedded, self.embedding_norm[...], eps)
        x = dense(jnp.concatenate(normed, axis=-1), self.projection[...])
        return rms_norm(x, layer.attention_norm[...], eps), x
