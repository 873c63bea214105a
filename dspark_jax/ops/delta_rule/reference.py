"""`delta_rule` by its definition: row after row."""

import jax
import jax.numpy as jnp


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
    number = jnp.arange(key.shape[1])
    begins = jnp.zeros(key.shape[:2], bool) if starts is None else starts == number

    def step(state: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        query, key, value, decay, rate, begins = row
        state = jnp.where(begins[:, None, None, None, None], 0, state * jnp.exp(decay)[..., None, None])
        error = value - jnp.einsum("bkh,bkrhw->bkrw", key, state, precision="highest")
        state = state + jnp.einsum("bkr,bkh,bkrw->bkrhw", rate, key, error, precision="highest")
        return state, (state, jnp.einsum("bkh,bkrhw->bkrw", query, state, precision="highest"))

    rows = tuple(x.swapaxes(0, 1) for x in (query, key, value, decay, rate, begins))
    _, (states, out) = jax.lax.scan(step, state, rows)
    return out.swapaxes(0, 1), states[kept - 1]
