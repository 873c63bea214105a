"""First step of a round: the drafter proposes tokens after each anchor."""

import dataclasses

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine.models import Models
from dspark_jax.engine.sampling import Requests
from dspark_jax.engine.state import DecodeState


def draft(models: Models, state: DecodeState, requests: Requests) -> tuple[Proposal, DecodeState]:
    """Drafts G tokens per request.

    Returns:
      The drafts, and the state with the drafter's cache as it is after them.
    """
    proposal, cache = models.drafter.propose(
        models.target,
        state.draft_cache,
        state.anchors,
        state.positions,
        requests.uniforms.draft,
        requests.sampling,
    )
    return proposal, dataclasses.replace(state, draft_cache=cache)
