"""A target whose residual stream is several streams: DeepSeek-V4. Its mixtures may go by the rows' tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.target.families.family import HyperShape, LayerShape
from dspark_jax.target.hyper_connections import HyperConnection, HyperHead, streams_of
from dspark_jax.target.layers import Layer
from dspark_jax.target.model import Target


class HyperLayer(Layer):
    """A layer with hyper-connections around attention and mixture, or a stack of them."""

    def __init__(
        self, arch: TargetArchitecture, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs, shape: LayerShape
    ):
        super().__init__(arch, stack=stack, scale=scale, rngs=rngs, shape=shape)
        assert shape.hyper is not None
        how = {"stack": stack, "scale": scale, "rngs": rngs}
        self.attention_streams = HyperConnection(arch, shape.hyper, **how)
        self.mlp_streams = HyperConnection(arch, shape.hyper, **how)

    def through(
        self, streams: jax.Array, attention: Callable[[Any, jax.Array], jax.Array], tokens: jax.Array
    ) -> jax.Array:
        """Streams [B, T, N, D] -> [B, T, N, D] of rows with these tokens [B, T]; `attention` as of a `Layer`."""

        def attend(x: jax.Array) -> jax.Array:
            return self.attention.output(attention(self.attention, self._normed(x, self.attention_norm)))

        streams = self.attention_streams.around(streams, attend)
        return self.mlp_streams.around(streams, lambda x: self.mlp(self._normed(x, self.mlp_norm), tokens))


class HyperTarget(Target):
    """A target with `HyperLayer`s. A drafter reads the mean of the streams, as in the servers that run DSpark on it."""

    def __init__(self, arch: TargetArchitecture, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, scale: float = 0.02):
        super().__init__(arch, rngs=rngs, dtype=dtype, scale=scale)
        self.streams_head = HyperHead(arch, self.hyper, scale=scale, rngs=rngs)

    @property
    def hyper(self) -> HyperShape:
        """What its hyper-connections are like."""
        shape = self.family.layer(self.arch).hyper
        assert shape is not None
        return shape

    def make_layers(self, kind: str, *, rngs: nnx.Rngs, scale: float) -> HyperLayer:
        """See `Target`."""
        stack, shape = (len(self.family.stack_layers(self.arch, kind)),), self.family.layer(self.arch, kind)
        return HyperLayer(self.arch, stack=stack, scale=scale, rngs=rngs, shape=shape)

    def enter(self, embedded: jax.Array) -> jax.Array:
        """See `Target`."""
        return streams_of(embedded, self.hyper)

    def run_layer(self, layer: HyperLayer, x: jax.Array, attention: Any, tokens: jax.Array) -> jax.Array:
        """See `Target`."""
        return layer.through(x, attention, tokens)

    def tapped(self, x: jax.Array) -> jax.Array:
        """See `Target`."""
        return jnp.mean(x, axis=-2)

    def leave(self, x: jax.Array) -> jax.Array:
        """See `Target`."""
        return self.streams_head(x)
