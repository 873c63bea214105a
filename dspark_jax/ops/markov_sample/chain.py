"""Sampling left to right, whatever gives the next logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.ops.sampling import Sampling, sample

Step = Callable[[int, Any, jax.Array], tuple[jax.Array, Any]]
"""(k, state, previous tokens [B]) -> (logits [B, V] of draft k, state)."""


def sample_chain(
    step: Step, state: Any, anchors: jax.Array, uniforms: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array, Any]:
    """Samples x_k from the logits that `step` gives after x_{k-1}, k = 0..G-1.

    G is small and static, so there is no loop.

    Args:
      step: logits of the next token; carries what it likes from draft to draft.
      state: what the first call gets.
      anchors: [B] tokens before the first draft.
      uniforms: [G, B, 2] int32, one per draw; see `ops.sampling.words`.
      sampling: temperature and filters per request.

    Returns:
      tokens [G, B] int32, logits [G, B, V] float32, before temperature and filters, and the last state.
    """
    tokens, rows, previous = [], [], anchors
    for k, uniform in enumerate(uniforms):
        logits, state = step(k, state, previous)
        logits = logits.astype(jnp.float32)
        previous = sample(logits, sampling, uniform)
        tokens.append(previous)
        rows.append(logits)
    return jnp.stack(tokens), jnp.stack(rows), state
