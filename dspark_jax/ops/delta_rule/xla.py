"""`delta_rule` in chunks of rows: within a chunk all is products of matrices and one triangular system.

Let c_i be the sum of the decays up to row i of a chunk. What row i adds to the state is k_i u_i, with

    u_i = rate_i (v_i - exp(c_i) k_i S - sum over j < i of exp(c_i - c_j) (k_i k_j) u_j)

so U solves (I + A) U = rates (V - K S). Exponents are never positive, and the system is solved by substitution: its
inverse as a product of powers of A overflows where many keys are alike.
"""

from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 64
"""Rows of a chunk, where there are more."""


def delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    decay: jax.Array,
    rate: jax.Array,
    state: jax.Array,
    *,
    starts: jax.Array | None,
    kept: int,
) -> tuple[jax.Array, jax.Array]:
    """See `api.delta_rule`."""
    rows = key.shape[1]
    if rows <= CHUNK or kept < rows:
        return _chunk(query, key, value, decay, rate, state, starts, kept)
    count = -(-rows // CHUNK)

    def chunks(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [T / 64, B, 64, ...]; what is added changes no state
        x = jnp.pad(
            x, ((0, 0), (0, count * CHUNK - rows), *[(0, 0)] * (x.ndim - 2)), mode="edge" if x.ndim == 2 else "constant"
        )
        return x.reshape(len(x), count, CHUNK, *x.shape[2:]).swapaxes(0, 1)

    def step(state: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
        (query, key, value, decay, rate), first, packed = chunk
        begins = None if packed is None else packed - first
        out, state = _chunk(query, key, value, decay, rate, state, begins, CHUNK)
        return state, out

    arrays = [chunks(x) for x in (query, key, value, decay, rate)]
    packed = None if starts is None else chunks(starts)
    state, out = jax.lax.scan(step, state, (arrays, jnp.arange(count) * CHUNK, packed))
    return out.swapaxes(0, 1).reshape(len(key), -1, *value.shape[2:])[:, :rows], state


def _chunk(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    decay: jax.Array,
    rate: jax.Array,
    state: jax.Array,
    starts: jax.Array | None,
    kept: int,
) -> tuple[jax.Array, jax.Array]:
    """All rows at once."""
    query, key = query.swapaxes(1, 2), key.swapaxes(1, 2)  # [B, K, T, H]
    value = value.transpose(0, 2, 3, 1, 4)  # [B, K, R, T, W]
    decay, rate = decay.transpose(0, 2, 3, 1), rate.transpose(0, 2, 3, 1)  # [B, K, R, T]
    row = jnp.arange(key.shape[2])
    sees = (row[:, None] >= row)[None]  # [1 or B, T, T]
    faded = jnp.cumsum(decay, axis=-1)
    before = jnp.exp(faded)  # what is left of the state before the chunk
    if starts is not None:
        sees = sees & (starts[:, :, None] <= row)
        before = jnp.where((starts < 0)[:, None, None], before, 0)
    left = jnp.exp(jnp.where(sees[:, None, None], faded[..., :, None] - faded[..., None, :], -jnp.inf))

    both = jnp.concatenate([key, query], axis=2)
    said = _product("bkth,bkrhw->bkrtw", both, state)  # one reading of the state
    alike = _product("bkth,bkjh->bktj", both, key)[:, :, None]
    rows = len(row)
    system = rate[..., None] * alike[..., :rows, :] * left  # the diagonal and what is above it are not read
    target = rate[..., None] * (value - before[..., None] * said[..., :rows, :])
    added = jax.lax.linalg.triangular_solve(system, target, left_side=True, lower=True, unit_diagonal=True)
    out = before[..., None] * said[..., rows:, :] + _product("bkrtj,bkrjw->bkrtw", alike[..., rows:, :] * left, added)

    last = left[..., kept - 1, :kept, None] * added[..., :kept, :]
    state = before[..., kept - 1, None, None] * state + _product("bkrtw,bkth->bkrhw", last, key[:, :, :kept])
    return out.transpose(0, 3, 1, 2, 4), state


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product in full float32: states are sums over a whole text."""
    return jnp.einsum(spec, left, right, precision="highest")
