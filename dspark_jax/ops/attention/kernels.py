"""What the kernels of `attention` share: the arrays that devices get, and the gradient that a frozen target never asks
for, which is that of `xla.attention`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dspark_jax.ops.attention import xla
from dspark_jax.sharding import per_device


class Case(NamedTuple):
    """Arguments of `api.attention`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    limit: jax.Array | None
    starts: jax.Array | None
    scale: float
    window: int
    sinks: jax.Array | None


def attend(case: Case, run: Callable[..., jax.Array]) -> jax.Array:
    """[B, T, N, H], of what `run` gives on every device.

    Args:
      case: of the operation.
      run: query [B, T, K, R, H], key and value [B, S, K, H], limit and first [B, T] int32, sinks [K, R] or None, and
        `scale` -> heads [B, T, K, R, H]. A row sees the keys first..limit-1, of which there is always one.
    """
    query, key, value, limit, starts, scale, window, sinks = case
    (b, t, n, h), k = query.shape, key.shape[2]
    limit = jnp.broadcast_to(jnp.arange(t) + 1, (b, t)) if limit is None else limit
    first = jnp.maximum(limit - window, 0) if window else jnp.zeros_like(limit)
    first = first if starts is None else jnp.maximum(first, starts)
    rows = limit.astype(jnp.int32), first.astype(jnp.int32)
    own = () if sinks is None else (sinks.reshape(k, n // k),)
    out: Any = _attend(query.reshape(b, t, k, n // k, h), key, value, *rows, own, run, scale)
    return out.reshape(query.shape)


_QUERY, _CONTEXT, _ROWS = ("batch", None, "kv_heads", None, None), ("batch", None, "kv_heads", None), ("batch", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    limit: jax.Array,
    first: jax.Array,
    sinks: tuple[jax.Array, ...],
    run: Callable[..., jax.Array],
    scale: float,
) -> jax.Array:
    def here(*arrays: jax.Array) -> tuple[jax.Array]:
        return (run(*arrays[:5], arrays[5] if sinks else None, scale=scale),)

    inputs = (_QUERY, _CONTEXT, _CONTEXT, _ROWS, _ROWS, *(("kv_heads", None) for _ in sinks))
    return per_device(here, inputs, (_QUERY,))(query, key, value, limit, first, *sinks)[0]


def _forward(*arguments: Any) -> tuple[jax.Array, Any]:
    return _attend(*arguments), arguments[:6]


def _backward(run: Any, scale: float, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    del run
    query, key, value, limit, first, sinks = kept
    b, t, k, r, h = query.shape

    def again(query: jax.Array, key: jax.Array, value: jax.Array, sinks: tuple[jax.Array, ...]) -> jax.Array:
        own = sinks[0].reshape(-1) if sinks else None
        heads = query.reshape(b, t, k * r, h)
        return xla.attention(heads, key, value, limit, first, scale=scale, window=0, sinks=own)

    d_query, d_key, d_value, d_sinks = jax.vjp(again, query, key, value, sinks)[1](d_out.reshape(b, t, k * r, h))
    return d_query, d_key, d_value, None, None, d_sinks


_attend.defvjp(_forward, _backward)
