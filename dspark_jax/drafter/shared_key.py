"""Attention of DeepSeek-V4's layers with a window: one key for all heads, which is the value, too, and sinks.

Queries are made in two steps, and so is the output, there in groups of heads. RoPE turns the last numbers of a head, in
pairs of neighbours. A value is a turned key, so what a head gives is turned back by the position of its query: what a
row adds then depends on how far away it is. A head's sink is a logit that takes its share and gives nothing.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.layer_sizes import LayerSizes
from dspark_jax.target.layers import dense, narrow, normal, ones, rms_norm, zeros


class SharedKeyAttention(nnx.Module):
    """The projections; a stack of them by a leading axis on every parameter."""

    def __init__(
        self, arch: TargetArchitecture, sizes: LayerSizes, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs
    ):
        d, n, h, rank = arch.hidden_size, sizes.num_attention_heads, sizes.head_dim, sizes.q_lora_rank
        groups, between = sizes.o_groups, sizes.o_groups * sizes.o_lora_rank
        self.query_down = normal(rngs, stack, (d, rank), ("embed", "rank"), scale)
        self.query_norm = ones(stack, rank)
        self.query_up = normal(rngs, stack, (rank, n, h), ("rank", "heads", "head_width"), scale)
        self.key = normal(rngs, stack, (d, h), ("embed", "head_width"), scale)
        self.key_norm = ones(stack, h)
        self.sinks = zeros(stack, (n,), ("norm",))
        self.out_down = normal(rngs, stack, (between, n // groups * h), ("rank", "features"), scale)
        self.out_up = normal(rngs, stack, (between, d), ("rank", "embed"), scale)
        self.sizes, self.eps = sizes, arch.rms_norm_eps

    def fuse_weights(self, dtype: jax.typing.DTypeLike, *, join: bool) -> None:
        """See `target.decode_weights`; nothing is joined."""
        del join
        for weight in (self.query_down, self.query_up, self.key, self.out_down, self.out_up):
            narrow(weight, dtype)

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [..., D], positions [...] -> normed and turned queries [..., N, H]."""
        inner = rms_norm(dense(x, self.query_down[...]), self.query_norm[...], self.eps)
        query = rms_norm(dense(inner, self.query_up[...]), None, self.eps)
        return turned(query, positions[..., None], self.sizes)

    def keys(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [..., D], positions [...] -> normed and turned keys [..., H]."""
        return turned(rms_norm(dense(x, self.key[...]), self.key_norm[...], self.eps), positions, self.sizes)

    def heads(self, query: jax.Array, key: jax.Array, seen: jax.Array) -> jax.Array:
        """Heads [..., G, N, H] of queries [..., G, N, H] over keys [..., K, H], of which seen [..., K] are visible."""
        scale = self.sizes.head_dim**-0.5
        logits = scale * jnp.einsum("...gnh,...kh->...gnk", query, key, preferred_element_type=jnp.float32)
        logits = jnp.where(seen[..., None, None, :], logits, -jnp.inf)
        sinks = self.sinks[...].astype(jnp.float32)[:, None]
        most = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), sinks)  # finite, whatever is seen
        shares = jnp.exp(logits - jax.lax.stop_gradient(most))
        whole = jnp.sum(shares, axis=-1, keepdims=True) + jnp.exp(sinks - jax.lax.stop_gradient(most))
        return jnp.einsum("...gnk,...kh->...gnh", (shares / whole).astype(key.dtype), key)

    def output(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
        """Heads [..., N, H] of queries at positions [...] -> [..., D]."""
        heads = turned(heads, -positions[..., None], self.sizes)
        groups, down = self.sizes.o_groups, self.out_down[...]
        grouped = heads.reshape(*heads.shape[:-2], groups, -1)
        inner = jnp.einsum("...gi,gri->...gr", grouped, down.astype(heads.dtype).reshape(groups, -1, down.shape[-1]))
        return dense(inner.reshape(*inner.shape[:-2], -1), self.out_up[...])


def turned(x: jax.Array, positions: jax.Array, sizes: LayerSizes) -> jax.Array:
    """x [..., H] with the pairs of its last numbers turned by positions [...], which may be negative."""
    width = sizes.qk_rope_head_dim
    frequency = sizes.rope_theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    phase = positions.astype(jnp.float32)[..., None] * frequency
    sin, cos = jnp.sin(phase), jnp.cos(phase)
    still, turning = x[..., :-width], x[..., -width:].astype(jnp.float32)
    first, second = turning[..., 0::2], turning[..., 1::2]
    pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([still, pairs.reshape(turning.shape).astype(x.dtype)], axis=-1)
