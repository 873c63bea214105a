"""Last step of a round: accepted tokens become part of the request, stop tokens and budgets end it.

The drafter reads the features of what was committed: at once, or, where rounds without drafts follow each other, some
of them together, which costs far less than one by one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine.models import Models
from dspark_jax.engine.state import DecodeState, Pending, Round
from dspark_jax.engine.verify import Verdict
from dspark_jax.target.model import TargetOutput


def is_stop(tokens: jax.Array, stop_tokens: jax.Array) -> jax.Array:
    """Which of `tokens` [B, ...] are in `stop_tokens` [K], or [B, K] per request; negative ids there match nothing."""
    if stop_tokens.ndim == 2:
        stop_tokens = stop_tokens.reshape(-1, *[1] * (tokens.ndim - 1), stop_tokens.shape[1])
    return jnp.any((tokens[..., None] == stop_tokens) & (stop_tokens >= 0), axis=-1)


def committed_round(
    proposal: Proposal, lengths: jax.Array, verdict: Verdict, stop_tokens: jax.Array
) -> tuple[Round, jax.Array]:
    """Cuts the accepted drafts after their first stop token, and counts (trap 25).

    Returns:
      The round, and whether a stop token ends each request [B].
    """
    block = jnp.arange(proposal.tokens.shape[1])
    stops = is_stop(proposal.tokens, stop_tokens) & (block < verdict.accepted[:, None])
    inside = jnp.any(stops, axis=1)
    accepted = jnp.minimum(verdict.accepted, until_first(stops))
    proposed = jnp.where(inside, accepted, lengths)
    emitted = accepted + jnp.where(inside, 0, 1)
    ended = inside | is_stop(verdict.next_token, stop_tokens)
    entry = Round(proposal.tokens, proposal.confidence, proposed, accepted, emitted, verdict.next_token, jnp.int32(0))
    return entry, ended


def until_first(stops: jax.Array) -> jax.Array:
    """How many of stops [B, G] there are up to and including the first True; G where there is none."""
    return jnp.sum(jnp.cumsum(stops, axis=1) - stops == 0, axis=1, dtype=jnp.int32)


def append(tokens: jax.Array, lengths: jax.Array, block: jax.Array) -> jax.Array:
    """tokens [B, C] with block [B, T] written at lengths[b]..lengths[b] + T - 1; what exceeds C is dropped."""
    offset = jnp.arange(tokens.shape[1]) - lengths[:, None]  # [B, C]
    inside = (offset >= 0) & (offset < block.shape[1])
    return jnp.where(inside, jnp.take_along_axis(block, jnp.clip(offset, 0, block.shape[1] - 1), axis=1), tokens)


def commit(
    models: Models,
    state: DecodeState,
    proposal: Proposal,
    lengths: jax.Array,
    verdict: Verdict,
    output: TargetOutput,
    stop_tokens: jax.Array,
) -> tuple[DecodeState, Round]:
    """Appends what a round produced; finished requests stay as they are.

    Args:
      models: the drafter absorbs the target's features of the verified tokens that were kept: the anchor and the
        accepted drafts. Without one nobody does (see `defer_features`).
      state: before the round.
      proposal: all drafts.
      lengths: [B] how many of them were verified.
      verdict: which of those hold, and the token that follows.
      output: the target's pass over the anchor and the drafts, G + 1 rows.
      stop_tokens: [K] ids that end a request, or [B, K]; negative ids are padding.

    Returns:
      The state after the round, and the round. A request never grows beyond its limit: tokens past it are dropped
      though the round's `emitted` counts them.
    """
    entry, ended = committed_round(proposal, lengths, verdict, stop_tokens)
    if getattr(models.drafter, "stops_drafting", False):
        # What it would draft after a stop token is never used: it follows from drafts alone, and is not counted.
        drafted = until_first(is_stop(proposal.tokens, stop_tokens))
        entry = dataclasses.replace(entry, proposed=jnp.minimum(entry.proposed, drafted))
    active = ~state.finished
    width = proposal.tokens.shape[1] + 1
    drafted = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    block = jnp.where(jnp.arange(width) == entry.accepted[:, None], entry.next_token[:, None], drafted)
    grown = jnp.minimum(state.lengths + entry.emitted, state.limits)

    verified = jnp.concatenate([state.anchors[:, None], proposal.tokens], axis=1)
    positions = state.positions[:, None] + jnp.arange(width)
    kept = jnp.where(active, entry.accepted + 1, 0)
    draft_cache = models.drafter.extend(state.draft_cache, output.features, verified, positions, kept)
    # A stop token that the budget cuts off was never emitted.
    stopped = ended & (state.lengths + entry.emitted <= state.limits)
    after = dataclasses.replace(
        state,
        tokens=jnp.where(active[:, None], append(state.tokens, state.lengths, block), state.tokens),
        lengths=jnp.where(active, grown, state.lengths),
        finished=state.finished | ended | (grown >= state.limits),
        stopped=jnp.where(active, stopped, state.stopped),
        rounds=state.rounds + active,
        target_cache=output.cache,
        draft_cache=draft_cache,
    )
    return after, entry


def defer_features(state: DecodeState, features: jax.Array, active: jax.Array) -> Pending:
    """The pending rows with those of a round without drafts: features [B, 1, M*D], of the `active` [B] requests."""
    pending = state.pending
    assert pending is not None
    rows, counts = pending.features, pending.counts
    if rows.shape[0] == 1:  # in place
        rows = jax.lax.dynamic_update_slice_in_dim(rows, features, counts[0], 1)
    else:
        rows = jnp.where((jnp.arange(rows.shape[1]) == counts[:, None])[..., None], features, rows)
    return Pending(rows, counts + active)


def extend_with_pending(models: Models, state: DecodeState) -> DecodeState:
    """Shows the drafter what is pending, R rows at a time; its cache then holds everything before the anchors."""
    pending = state.pending
    assert pending is not None
    size = models.pending_rows
    first = state.positions - pending.counts

    def read(start: jax.Array, cache: Any) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(pending.features, start, size, 1)
        positions = (first + start)[:, None] + jnp.arange(size)
        tokens = jnp.take_along_axis(state.tokens, jnp.minimum(positions, state.tokens.shape[1] - 1), axis=1)
        counts = jnp.clip(pending.counts - start, 0, size)
        return models.drafter.extend(cache, rows, tokens, positions, counts)

    if pending.features.shape[1] == size:
        cache = read(jnp.int32(0), state.draft_cache)
    else:  # of one request: another's last rows could lie behind the end of the cache
        assert len(first) == 1
        _, cache = jax.lax.while_loop(
            lambda carry: carry[0] < pending.counts[0],
            lambda carry: (carry[0] + size, read(*carry)),
            (jnp.int32(0), state.draft_cache),
        )
    cleared = dataclasses.replace(pending, counts=jnp.zeros_like(pending.counts))
    return dataclasses.replace(state, draft_cache=cache, pending=cleared)
