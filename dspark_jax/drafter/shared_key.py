"""Attention of the rows of a block to a window of the context and to each other, as DeepSeek-V4's layers have it.

One key per row for all heads, which is the value, too; each head has a sink, a score that takes part in no output. The
projections are those of the target's layers without compressed rows (`target.compressed`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.layer_sizes import LayerSizes
from dspark_jax.ops.sinks import shares
from dspark_jax.target.compressed import CompressedAttention, turned
from dspark_jax.target.families.family import CompressedShape
from dspark_jax.target.layers import dense, rms_norm


class SharedKeyAttention(CompressedAttention):
    """The projections, of queries and keys apart; a stack of them by a leading axis on every parameter."""

    def __init__(
        self, arch: TargetArchitecture, sizes: LayerSizes, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs
    ):
        shape = CompressedShape(
            sizes.num_attention_heads, sizes.head_dim, sizes.qk_rope_head_dim, sizes.rope_theta, (),
            sizes.q_lora_rank, sizes.o_groups, sizes.o_lora_rank, window=0,
        )  # fmt: skip
        super().__init__(arch, shape, stack=stack, scale=scale, rngs=rngs)

    def keys(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [..., D], positions [...] -> normed and turned keys [..., H]."""
        return turned(rms_norm(dense(x, self.row[...]), self.row_norm[...], self.eps), positions, self.shape)

    def heads(self, query: jax.Array, key: jax.Array, seen: jax.Array) -> jax.Array:
        """Heads [..., G, N, H] of queries [..., G, N, H] over keys [..., K, H], of which seen [..., K] are visible."""
        logits = jnp.einsum("...gnh,...kh->...gnk", query, key, preferred_element_type=jnp.float32)
        logits = jnp.where(seen[..., None, None, :], self.shape.width**-0.5 * logits, -jnp.inf)
        return jnp.einsum("...gnk,...kh->...gnh", shares(logits, self.sinks[...]).astype(key.dtype), key)

    def block_output(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
        """Heads [B, ..., N, H] of queries at positions [B, ...] -> [B, ..., D]."""
        heads, lead = self.turned_back(heads, positions), positions.shape
        return self.output(heads.reshape(lead[0], -1, *heads.shape[-2:])).reshape(*lead, -1)
