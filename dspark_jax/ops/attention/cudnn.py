"""`attention` by cuDNN, as JAX calls it: the scores never leave the multiprocessors. For NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.dispatch import Unsupported


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    limit: jax.Array | None,
    starts: jax.Array | None,
    *,
    scale: float,
    window: int,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """See `api.attention`. Documents become a mask [B, 1, T, T]; rows with limits of their own are not done here."""
    if sinks is not None:
        raise Unsupported("heads have sinks")
    if limit is not None:
        raise Unsupported("rows have limits of their own")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"cuDNN does not attend in {query.dtype}")
    mask = None
    if starts is not None:
        mask = (jnp.arange(key.shape[1]) >= starts[..., None])[:, None]
    try:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            is_causal=True,
            local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn",
        )
    except (RuntimeError, ValueError, NotImplementedError) as refusal:  # no cuDNN, or not for this head width
        raise Unsupported(f"cuDNN: {refusal}") from None
