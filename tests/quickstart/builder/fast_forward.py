"""The training forward pass of the embedded model: `Target` with products that take a CPU's bfloat16 units.

Master weights, norms, softmax and sums stay float32; only the operands of products are rounded, which on CPUs with
matrix units is about four times faster than float32. `tests/quickstart` compares it with `Target.forward`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.ops.product import bfloat16_product, transposed
from dspark_jax.target.layers import rms_norm, rope
from dspark_jax.target.model import Target

_MASKED = -1e30
_CHUNK = 128  # query rows per attention product; later keys are not computed at all


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention of query [B, S, N, H] to key, value [B, S, K, H] -> [B, S, N, H]."""
    b, s, n, h = query.shape
    k = key.shape[2]
    query = query.transpose(0, 2, 1, 3).reshape(b, k, n // k, s, h) * h**-0.5
    key, value = transposed(key.transpose(0, 2, 1, 3)), value.transpose(0, 2, 1, 3)  # [B, K, H, S], [B, K, S, H]
    out = []
    for start in range(0, s, _CHUNK):
        stop = min(start + _CHUNK, s)
        rows = query[..., start:stop, :].reshape(b, k, -1, h)
        visible = jnp.tril(jnp.ones((stop - start, stop), bool), start)
        scores = bfloat16_product(rows, key[..., :stop]).reshape(b, k, n // k, stop - start, stop)
        weights = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1).reshape(b, k, -1, stop)
        out.append(bfloat16_product(weights, value[..., :stop, :]).reshape(b, k, n // k, stop - start, h))
    return jnp.concatenate(out, axis=3).reshape(b, n, s, h).transpose(0, 2, 1, 3)


def last_hidden(model: Target, tokens: jax.Array) -> jax.Array:
    """tokens [B, S], positions 0..S-1 -> [B, S, D] after the final norm."""
    arch = model.arch
    b, s = tokens.shape
    d, n, k, h = arch.hidden_size, arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
    positions = jnp.broadcast_to(jnp.arange(s), (b, s))
    x = model.embedding[...][tokens].reshape(b * s, d)
    leaves, tree = jax.tree.flatten(model.layers)
    split = [jax.lax.split(leaf, [1] * arch.num_hidden_layers) for leaf in leaves]  # its gradient is one concatenation
    for index in range(arch.num_hidden_layers):
        layer: Any = jax.tree.unflatten(tree, [parts[index][0] for parts in split])
        at, mlp = layer.attention, layer.mlp
        normed = rms_norm(x, layer.attention_norm[...], arch.rms_norm_eps)
        query, key, value = (
            bfloat16_product(normed, w[...].reshape(d, heads * h)).reshape(b, s, heads, h)
            for w, heads in ((at.query, n), (at.key, k), (at.value, k))
        )
        query = rope(rms_norm(query, at.query_norm[...], arch.rms_norm_eps), positions, arch.rope_theta)
        key = rope(rms_norm(key, at.key_norm[...], arch.rms_norm_eps), positions, arch.rope_theta)
        heads = _attend(query, key, value).reshape(b * s, n * h)
        x = x + bfloat16_product(heads, at.out[...].reshape(n * h, d))
        normed = rms_norm(x, layer.mlp_norm[...], arch.rms_norm_eps)
        x = x + bfloat16_product(
            jax.nn.silu(bfloat16_product(normed, mlp.gate[...])) * bfloat16_product(normed, mlp.up[...]), mlp.down[...]
        )
    return rms_norm(x, model.norm[...], arch.rms_norm_eps).reshape(b, s, d)
