"""One turn of decoding: draft, schedule, verify, commit; or, where drafts would not pay, the target alone."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine.commit import commit, defer_features, extend_with_pending
from dspark_jax.engine.draft import draft
from dspark_jax.engine.models import Models
from dspark_jax.engine.sampling import Requests
from dspark_jax.engine.schedulers import Scheduler, fixed
from dspark_jax.engine.state import DecodeState, Round
from dspark_jax.engine.verify import Verdict, verify, verify_flat
from dspark_jax.target.model import TargetOutput

T = TypeVar("T")

# A round, drawn for one request: G = 3 drafts, six committed tokens a..f. The newest is the anchor; no cache has it.
#
#     position          0  1  2  3  4  5  6  7  8
#     tokens            a  b  c  d  e  f             lengths = 6
#     target's cache    a  b  c  d  e                rows 0..lengths - 2; the drafter's cache likewise
#
#     draft             a block drafter reads f and two masks at 5, 6, 7, and drafts x, y, z
#     drafter's cache   a  b  c  d  e  *  *  *       its own rows: overwritten below
#
#     verify            the target reads f, x, y, z at 5..8; its logits of row 5 judge x, those of row 6 judge y, ...
#     target's cache    a  b  c  d  e  f  x  y  z
#
#     commit            x and y are accepted, z is not: w is drawn in its place (the correction). 3 tokens, 2 accepted
#     tokens            a  b  c  d  e  f  x  y  w    lengths = 9; w is the next anchor
#     target's cache    a  b  c  d  e  f  x  y  z    row 8 is stale: the next round writes w there before it reads it
#     drafter's cache   a  b  c  d  e  f  x  y  *    extended by the target's features of f, x and y; row 8 is stale
#
# Going back costs nothing: a length says which rows count.


def decode_round(
    models: Models,
    state: DecodeState,
    requests: Requests,
    *,
    scheduler: Scheduler | None = None,
    sizes: tuple[int, ...] = (),
) -> tuple[DecodeState, Round]:
    """One round: draft, schedule (all drafts without a scheduler), verify, commit.

    A scheduler that alternates decides first whether this is a round with drafts. See `drafting_round` for `sizes`.
    """
    scheduler = scheduler or fixed()
    if not scheduler.alternates:
        return drafting_round(models, state, requests, scheduler, sizes=sizes)
    kinds = (
        lambda at: drafting_round(models, at[0], requests, scheduler, sizes=sizes),
        lambda at: plain_round(models, at[0], requests, scheduler),
    )
    # Two loops of at most one turn: unlike the branches of a conditional, they update the caches in place.
    entry = no_round(models, state.lengths.shape[0])
    drafts = scheduler.drafts_now(state.history, ~state.finished)
    assert state.pending is not None
    state = catch_up(models, state, drafts | state.pending.full)
    state, entry = _when(drafts, kinds[0], (state, entry))
    return _when(~drafts, kinds[1], (state, entry))


def drafting_round(
    models: Models, state: DecodeState, requests: Requests, scheduler: Scheduler, *, sizes: tuple[int, ...] = ()
) -> tuple[DecodeState, Round]:
    """A round in which the drafter drafts, whatever the scheduler admits.

    With `sizes` (rising, static) the scheduled tokens of all requests are verified as one flat batch of the smallest
    size that holds them; without, or where none does, all requests have G + 1 rows each. The tokens are the same.
    """
    active = ~state.finished
    if sizes:
        scheduler = scheduler.filling((*sizes, len(active) * models.rows))
    proposal, state = draft(models, state, requests)
    lengths, history = scheduler.schedule(proposal, active, state.history)
    verdict, output, rows = _verify(models, state, proposal, lengths, requests, sizes)
    after, entry = commit(models, state, proposal, lengths, verdict, output, requests.stop_tokens)
    seen = (entry.proposed, entry.accepted, active)
    history = scheduler.observe(history, *seen, drafted=True, expected=scheduler.expected(proposal))
    return dataclasses.replace(after, history=history), dataclasses.replace(entry, rows=rows)


def _verify(
    models: Models,
    state: DecodeState,
    proposal: Proposal,
    lengths: jax.Array,
    requests: Requests,
    sizes: tuple[int, ...],
) -> tuple[Verdict, TargetOutput, jax.Array]:
    """`verify_flat` at the smallest of `sizes` that holds the scheduled tokens, or else `verify`; and the rows."""

    def run(cache: Any, size: int) -> tuple[Verdict, jax.Array, Any]:
        """Verdict, features and cache: what a round goes on with. Size 0: G + 1 rows for every request."""
        before = dataclasses.replace(state, target_cache=cache)
        if size:
            verdict, output = verify_flat(models, before, proposal, lengths, requests, size=size)
        else:
            verdict, output = verify(models, before, proposal, lengths, requests)
        return verdict, output.features, output.cache

    most = jnp.int32(len(lengths) * (proposal.tokens.shape[1] + 1))
    if not sizes:
        return *verify(models, state, proposal, lengths, requests), most
    tokens = jnp.sum(jnp.where(state.finished, 0, lengths + 1))
    chosen = jnp.sum(tokens > jnp.asarray(sizes))
    shapes = jax.eval_shape(lambda: run(state.target_cache, 0)[:2])
    carry = (*jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), state.target_cache)
    for number, size in enumerate((*sizes, 0)):  # loops of one turn, which update the cache in place (see `_when`)

        def body(carry: Any, size: int = size) -> Any:
            return (*run(carry[2], size), jnp.bool_(False))

        carry = jax.lax.while_loop(lambda carry: carry[3], body, (*carry, chosen == number))[:3]
    verdict, features, cache = carry
    output = TargetOutput(features, jnp.zeros((*features.shape[:2], 0), features.dtype), cache)
    return verdict, output, jnp.stack([*map(jnp.int32, sizes), most])[chosen]


def plain_round(
    models: Models, state: DecodeState, requests: Requests, scheduler: Scheduler
) -> tuple[DecodeState, Round]:
    """A round without drafts: one token per request, which is left pending for the drafter's cache to learn."""
    batch, active = state.lengths.shape[0], ~state.finished
    alone, own, none = models.plain(), requests.without_drafts(), jnp.zeros((batch,), jnp.int32)
    nothing, _ = draft(alone, state, own)
    verdict, output = verify(models, state, nothing, none, own)
    after, entry = commit(alone, state, nothing, none, verdict, output, requests.stop_tokens)
    history = scheduler.observe(state.history, none, none, active, drafted=False)
    pending = defer_features(state, output.features, active)
    blank = no_round(models, batch)
    entry = dataclasses.replace(entry, drafted=blank.drafted, confidence=blank.confidence, rows=jnp.int32(batch))
    return dataclasses.replace(after, history=history, pending=pending), entry


def catch_up(models: Models, state: DecodeState, wanted: jax.Array) -> DecodeState:
    """The state without pending rows if that is wanted and there are some; a drafting round needs it."""
    assert state.pending is not None
    late = wanted & jnp.any(state.pending.counts > 0)
    return _when(late, lambda state: extend_with_pending(models, state), state)


def no_round(models: Models, batch: int) -> Round:
    """A round in which nothing was drafted and nothing committed."""
    none = jnp.zeros((batch,), jnp.int32)
    block = (batch, models.block_size)
    confidence = jnp.zeros(block, jnp.float32) if models.confident else None
    return Round(jnp.full(block, -1, jnp.int32), confidence, none, none, none, none, jnp.int32(0))


def _when(wanted: jax.Array, turn: Callable[[T], T], state: T) -> T:
    """`turn(state)` if it is wanted, else `state`."""

    def body(carry: Any) -> Any:
        return turn(carry[0]), jnp.bool_(False)

    return jax.lax.while_loop(lambda carry: carry[1], body, (state, wanted))[0]
