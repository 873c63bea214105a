"""First step of a round: the drafter proposes tokens after each anchor."""

from typing import Any

import jax.numpy as jnp

from dspark_jax.drafter.interface import Drafter, Proposal
from dspark_jax.engine.sampling import Uniforms
from dspark_jax.engine.state import DecodeState
from dspark_jax.ops.sampling import Sampling


def draft(target: Any, drafter: Drafter | None, state: DecodeState, uniforms: Uniforms, sampling: Sampling) -> Proposal:
    """Drafts G tokens per request; without a drafter the proposal is empty (G = 0), which is plain decoding."""
    if drafter is None:
        batch = state.lengths.shape[0]
        empty = jnp.zeros((batch, 0), jnp.int32)
        return Proposal(empty, jnp.zeros((batch, 0, target.arch.vocab_size), jnp.float32), None)
    return drafter.propose(target, state.draft_cache, state.anchors, state.positions, uniforms.draft, sampling)
