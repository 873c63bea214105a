"""Manifold-constrained hyper-connections (DeepSeek-V4): a residual stream of N rows of width D in the place of one.

Before a sublayer the N streams of a row are collapsed into the one that it reads; what it gives is added to each of
them, and they are mixed with each other. The three sets of weights come from the streams themselves. That of mixing is
made doubly stochastic (Sinkhorn-Knopp), so that depth neither blows the streams up nor lets them fade.

Weights are computed in float32, streams are held in the compute type.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.target.families.family import HyperShape
from dspark_jax.target.layers import dense, normal, ones, rms_norm, zeros


def streams_of(x: jax.Array, shape: HyperShape) -> jax.Array:
    """Embeddings [..., D] -> N streams [..., N, D] that are all the same."""
    return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], shape.streams, x.shape[-1]))


class HyperConnection(nnx.Module):
    """What is around one sublayer; a stack of them by a leading axis on every parameter."""

    def __init__(
        self, arch: TargetArchitecture, shape: HyperShape, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs
    ):
        self.shape, self.eps = shape, arch.rms_norm_eps
        n, d = shape.streams, arch.hidden_size
        self.mix = normal(rngs, stack, (n, d, (2 + n) * n), ("streams", "embed", "streams_out"), scale)
        self.base = zeros(stack, ((2 + n) * n,), ("streams_out",))
        self.scale = ones(stack, 3)  # of collapsing, of what the sublayer gives, of mixing

    def around(self, streams: jax.Array, sublayer: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The streams [..., N, D] after a sublayer, which reads and gives [..., D]."""
        x, kept = self.collapse(streams)
        return self.expand(streams, sublayer(x), kept)

    def collapse(self, streams: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """streams [..., N, D] -> what the sublayer reads [..., D]; and what `expand` wants besides its output."""
        n, eps = self.shape.streams, self.shape.eps
        weights = _weights(streams, self.mix[...], self.eps)
        scale, base = self.scale[...].astype(jnp.float32), self.base[...].astype(jnp.float32)
        pre, post, mixing = (
            part * scale[i] + offset
            for i, (part, offset) in enumerate(
                zip(jnp.split(weights, (n, 2 * n), axis=-1), jnp.split(base, (n, 2 * n)), strict=True)
            )
        )
        mixing = jax.nn.softmax(mixing.reshape(*mixing.shape[:-1], n, n), axis=-1) + eps
        mixing = sinkhorn(mixing, self.shape.iterations, eps)
        return _sum(jax.nn.sigmoid(pre) + eps, streams), (2 * jax.nn.sigmoid(post), mixing)

    def expand(self, streams: jax.Array, out: jax.Array, kept: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The streams [..., N, D] after the sublayer, which gave `out` [..., D]."""
        post, mixing = (x.astype(streams.dtype) for x in kept)
        return post[..., None] * out[..., None, :] + jnp.einsum("...jk,...jd->...kd", mixing, streams)


class HyperHead(nnx.Module):
    """What collapses the streams after the last layer."""

    def __init__(
        self,
        arch: TargetArchitecture,
        shape: HyperShape,
        *,
        stack: tuple[int, ...] = (),
        scale: float = 0.02,
        rngs: nnx.Rngs,
    ):
        self.shape, self.eps = shape, arch.rms_norm_eps
        n, d = shape.streams, arch.hidden_size
        self.mix = normal(rngs, stack, (n, d, n), ("streams", "embed", "streams_out"), scale)
        self.base = zeros(stack, (n,), ("streams_out",))
        self.scale = ones(stack, 1)

    def __call__(self, streams: jax.Array) -> jax.Array:
        """streams [..., N, D] -> [..., D]."""
        weights = _weights(streams, self.mix[...], self.eps)
        pre = jax.nn.sigmoid(weights * self.scale[...].astype(jnp.float32) + self.base[...].astype(jnp.float32))
        return _sum(pre + self.shape.eps, streams)


def sinkhorn(matrix: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Positive matrices [..., N, N] -> rows and columns that add up to about 1; columns last."""

    def over(axis: int, matrix: jax.Array) -> jax.Array:
        return matrix / (jnp.sum(matrix, axis=axis, keepdims=True) + eps)

    return jax.lax.fori_loop(1, iterations, lambda _, x: over(-2, over(-1, x)), over(-2, matrix))


def _weights(streams: jax.Array, mix: jax.Array, eps: float) -> jax.Array:
    """streams [..., N, D], mix [N, D, O] -> [..., O], of all streams normed together."""
    flat = streams.astype(jnp.float32).reshape(*streams.shape[:-2], -1)
    return dense(rms_norm(flat, None, eps), mix.astype(jnp.float32).reshape(-1, mix.shape[-1]))


def _sum(weights: jax.Array, streams: jax.Array) -> jax.Array:
    """The weighted sum of the streams, in their type."""
    return jnp.sum(weights[..., None] * streams, axis=-2).astype(streams.dtype)
