"""Grouped dynamic depthwise convolution along the rows of a block (DFlash 2), around a sublayer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.sharding import Param
from dspark_jax.target.layers import dense, narrow

BEFORE, AFTER = 0, 1


class BlockConvolution(nnx.Module):
    """Two convolutions, of a sublayer's input and of its output; a stack of layers has a leading axis L.

    out_t = sum_i (base[i] + delta_t[i]) * x_{t-i} for i = 0..taps-1, where what lies before the block's first row is 0.
    `base` has a number for every channel; `delta`, which a projection of the sublayer's normed input gives for both
    convolutions, has one for every group of channels. It starts as the identity.
    """

    def __init__(self, width: int, rows: int, *, taps: int, group: int, stack: tuple[int, ...] = ()):
        """
        Args:
          width: D, a multiple of `group`.
          rows: of a block, at least `taps`.
          taps: of each convolution.
          group: channels that share a coefficient.
          stack: leading axes of the parameters.
        """
        self.rows, self.taps, self.groups = rows, taps, width // group
        layers = ("layers",) * len(stack)
        base = jnp.zeros((*stack, 2, taps, width), jnp.float32).at[..., 0, :].set(1.0)
        self.base = Param(base, axes=(*layers, "features", "features", "norm"))
        projection = jnp.zeros((*stack, width, 2 * taps * self.groups), jnp.float32)
        self.projection = Param(projection, axes=(*layers, "embed", "features"))

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `target.decode_weights`."""
        del join
        narrow(self.projection, dtype)

    def __call__(self, normed: jax.Array, sublayer: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The sublayer between its convolutions.

        Args:
          normed: [B, T, D], its normed input; rows are those of blocks after each other.
          sublayer: [B, T, D] -> [B, T, D].

        Returns:
          [B, T, D].
        """
        delta = dense(normed, self.projection[...]).reshape(*normed.shape[:2], 2, self.taps, self.groups)
        return self._convolve(sublayer(self._convolve(normed, delta, BEFORE)), delta, AFTER)

    def _convolve(self, x: jax.Array, delta: jax.Array, side: int) -> jax.Array:
        """x [B, T, D], convolved in float32."""
        b, t, d = x.shape
        blocks = x.astype(jnp.float32).reshape(b, t // self.rows, self.rows, self.groups, d // self.groups)
        steps = delta[:, :, side].astype(jnp.float32).reshape(*blocks.shape[:3], self.taps, self.groups, 1)
        base = self.base[...][side].astype(jnp.float32).reshape(self.taps, self.groups, d // self.groups)
        out = jnp.zeros_like(blocks)
        for tap in range(self.taps):
            earlier = jnp.pad(blocks[:, :, : self.rows - tap], [(0, 0), (0, 0), (tap, 0), (0, 0), (0, 0)])
            out += (base[tap] + steps[..., tap, :, :]) * earlier
        return out.reshape(b, t, d).astype(x.dtype)
