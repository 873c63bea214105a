"""First step of a round: the drafter proposes tokens after each anchor."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dspark_jax.drafter.interface import Drafter, Proposal
from dspark_jax.engine.sampling import Uniforms
from dspark_jax.engine.state import DecodeState
from dspark_jax.ops.sampling import Sampling


def draft(
    target: Any, drafter: Drafter | None, state: DecodeState, uniforms: Uniforms, sampling: Sampling
) -> tuple[Proposal, DecodeState]:
    """Drafts G tokens per request; without a drafter the proposal is empty (G = 0), which is plain decoding.

    Returns:
      The drafts, and the state with the drafter's cache as it is after them.
    """
    if drafter is None:
        batch = state.lengths.shape[0]
        empty = jnp.zeros((batch, 0), jnp.int32)
        return Proposal(empty, jnp.zeros((batch, 0, target.arch.vocab_size), jnp.float32), None), state
    proposal, cache = drafter.propose(
        target, state.draft_cache, state.anchors, state.positions, uniforms.draft, sampling
    )
    return proposal, dataclasses.replace(state, draft_cache=cache)
