"""Randomness of decoding: a key per request, folded with an absolute position.

A request's draws depend on its key and on how far it has come, never on its neighbours in the batch, on padding or on
how many requests are decoded together.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniforms:
    """Everything random about one decoding round, in [0, 1).

    Attributes:
      draft: [B, G] draws the drafted tokens.
      accept: [B, G] accepts or rejects them; all are spent, also those behind a rejection.
      next: [B] draws the token that follows the accepted ones.
    """

    draft: jax.Array
    accept: jax.Array
    next: jax.Array


def request_keys(seed: int, requests: jax.Array) -> jax.Array:
    """One key per request number: requests [B] int32 -> keys [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), requests)


def round_uniforms(keys: jax.Array, positions: jax.Array, block_size: int) -> Uniforms:
    """The uniforms of the round whose anchor stands at `positions`.

    No two rounds of a request share an anchor position, so every round draws afresh.

    Args:
      keys: [B] request keys.
      positions: [B] absolute position of each request's newest token.
      block_size: G; 0 leaves only `next`.
    """
    folded = jax.vmap(jax.random.fold_in)(keys, positions)
    rows = jax.vmap(lambda key: jax.random.uniform(key, (2 * block_size + 1,), jnp.float32))(folded)
    return Uniforms(rows[:, :block_size], rows[:, block_size : 2 * block_size], rows[:, -1])
