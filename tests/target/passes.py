"""Passes over the cache of a target, for tests of what layers keep of earlier rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def stepper(target: Any) -> Callable[..., tuple[jax.Array, Any]]:
    """A compiled pass: (tokens [B, S], first positions [B], cache, counts) -> last hidden states, cache."""

    @jax.jit
    def run(tokens, first, cache, counts=None):
        positions = jnp.asarray(first)[:, None] + jnp.arange(tokens.shape[1])
        out = target.forward(jnp.asarray(tokens), positions, cache, counts=counts)
        return out.last_hidden, out.cache

    return run
