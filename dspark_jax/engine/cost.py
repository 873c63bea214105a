"""What rounds cost here: timed on requests in the middle of decoding, which never end.

The tokens do not matter: without filters, the time of a round depends on shapes alone.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.engine.models import for_decoding
from dspark_jax.engine.round import catch_up, drafting_round, plain_round
from dspark_jax.engine.sampling import request_keys, round_uniforms
from dspark_jax.engine.schedule import Scheduler
from dspark_jax.engine.state import DecodeState, Pending, round_rows
from dspark_jax.ops.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class RoundShape:
    """What the time of a round depends on.

    Attributes:
      slots: B, requests that the arrays have room for.
      context: tokens of every request; all of its cache is looked at.
      tokens: T, tokens in the verified batch; 0 is a round without drafts.
    """

    slots: int
    context: int
    tokens: int


def midway(target: Any, drafter: Any, scheduler: Scheduler, slots: int, active: int, context: int) -> DecodeState:
    """The state of `slots` requests of `context` tokens each, of which the first `active` go on for ever."""
    block_size = 0 if drafter is None else drafter.block_size
    rows, row = context + block_size + 1, jnp.arange(slots, dtype=jnp.int32)
    return dataclasses.replace(
        DecodeState.empty(target, drafter, slots, rows),
        tokens=(row[:, None] + jnp.arange(rows, dtype=jnp.int32)) % min(target.arch.vocab_size, 1000),
        lengths=jnp.full_like(row, context),
        limits=jnp.full_like(row, jnp.iinfo(jnp.int32).max),
        finished=row >= active,
        keys=request_keys(0, row),
        history=scheduler.start(slots, block_size),
    )


def round_seconds(target: Any, drafter: Any, shape: RoundShape, *, rounds: int = 12, repeats: int = 3) -> float:
    """Seconds of a greedy round of this shape, the best of several runs.

    Args:
      target: the language model.
      drafter: drafts for it; rounds without drafts keep its cache up to date. None decodes plainly.
      shape: of the round; of T tokens, every request that there is gets its share.
      rounds: that are timed together.
      repeats: runs.
    """
    run = rounds_of(target, drafter, shape)

    def timed(count: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(run(count))
        return time.perf_counter() - started

    timed(1)  # compiles
    # One round more and less than all, so that the caches' first copies do not count.
    seconds = min(timed(1 + rounds) for _ in range(repeats)) - min(timed(1) for _ in range(repeats))
    return max(seconds / rounds, 1e-9)


def rounds_of(target: Any, drafter: Any, shape: RoundShape) -> Callable[[int], jax.Array]:
    """What `round_seconds` times: decodes so many rounds of this shape in one program."""
    target, drafter = for_decoding(target, drafter, batch_size=shape.slots)
    active = min(shape.tokens, shape.slots) or shape.slots
    share = min(shape.tokens // active, round_rows(drafter))
    scheduler = Scheduler.fixed(max(share - 1, 0))
    state = midway(target, drafter, scheduler, shape.slots, active, shape.context)
    return lambda count: _rounds(target, drafter, state, scheduler, jnp.int32(count), shape.tokens)


@functools.partial(jax.jit, static_argnames=("size",))
def _rounds(
    target: Any, drafter: Any, state: DecodeState, scheduler: Scheduler, count: jax.Array, size: int
) -> jax.Array:
    """Tokens after `count` rounds that all begin at the same place."""
    slots = state.lengths.shape[0]
    sampling, stops = Sampling.constant(0.0, slots), jnp.full((1,), -1, jnp.int32)
    block_size = 0 if drafter is None else drafter.block_size
    if drafter is not None and not size:
        state = dataclasses.replace(state, pending=Pending.empty(target, drafter, slots))

    def turn(number: jax.Array, at: DecodeState) -> DecodeState:
        del number
        settings = (at, round_uniforms(at.keys, at.positions, block_size), sampling, stops)
        if size or drafter is None:
            sizes = (size,) if size else ()
            after = drafting_round(target, drafter, *settings, scheduler, sizes=sizes)[0]
        else:
            after = plain_round(target, drafter, *settings)[0]
            assert after.pending is not None
            after = catch_up(drafter, after, after.pending.full)
        return dataclasses.replace(after, lengths=at.lengths, finished=at.finished, stopped=at.stopped)

    return jax.lax.fori_loop(0, count, turn, state).tokens
