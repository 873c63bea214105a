"""What rounds cost here: timed on requests in the middle of decoding, which never end.

The tokens do not matter: without filters, the time of a round depends on shapes alone.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dspark_jax.engine import schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.round import catch_up, drafting_round, plain_round
from dspark_jax.engine.sampling import Requests, request_keys, round_uniforms
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.engine.sizes import verified_sizes
from dspark_jax.engine.state import DecodeState, Pending
from dspark_jax.ops.sampling import Sampling
from dspark_jax.sharding import evenly


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


def decoding_state(models: Models, scheduler: Scheduler, slots: int, active: int, context: int) -> DecodeState:
    """The state of `slots` requests of `context` tokens each, of which the first `active` go on for ever."""
    rows, row = context + models.rows, jnp.arange(slots, dtype=jnp.int32)
    return dataclasses.replace(
        DecodeState.empty(models, slots, rows),
        tokens=(row[:, None] + jnp.arange(rows, dtype=jnp.int32)) % min(models.arch.vocab_size, 1000),
        lengths=jnp.full_like(row, context),
        limits=jnp.full_like(row, jnp.iinfo(jnp.int32).max),
        finished=row >= active,
        keys=request_keys(0, row),
        history=scheduler.start(slots, models.block_size),
    )


def round_seconds(models: Models, shape: RoundShape, *, rounds: int = 12, repeats: int = 3) -> float:
    """Seconds of a greedy round of this shape, the best of several runs.

    Args:
      models: rounds without drafts keep the drafter's cache up to date.
      shape: of the round; of T tokens, every request that there is gets its share.
      rounds: that are timed together.
      repeats: runs.
    """
    run = rounds_of(models, shape)

    def timed(count: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(run(count))
        return time.perf_counter() - started

    timed(1)  # compiles
    # One round more and less than all, so that the caches' first copies do not count.
    seconds = min(timed(1 + rounds) for _ in range(repeats)) - min(timed(1) for _ in range(repeats))
    return max(seconds / rounds, 1e-9)


def rounds_of(models: Models, shape: RoundShape) -> Callable[[int], jax.Array]:
    """What `round_seconds` times: decodes so many rounds of this shape in one program, that of `Engine`."""
    slots = evenly(shape.slots)
    models = models.for_decoding(batch_size=slots)
    active = min(shape.tokens, shape.slots) or shape.slots
    share, more = divmod(shape.tokens, active)
    drafted = jnp.clip(share - 1 + (jnp.arange(slots) < more), 0, models.block_size)
    scheduler = schedulers.fixed(drafted)
    sizes = verified_sizes(None, scheduler, slots, models.rows)
    state = decoding_state(models, scheduler, slots, active, shape.context)
    drafts = bool(shape.tokens) or not models.drafts
    return lambda count: _rounds(models, state, scheduler, jnp.int32(count), drafts=drafts, sizes=sizes)


@functools.partial(jax.jit, static_argnames=("drafts", "sizes"))
def _rounds(
    models: Models,
    state: DecodeState,
    scheduler: Scheduler,
    count: jax.Array,
    *,
    drafts: bool,
    sizes: tuple[int, ...],
) -> jax.Array:
    """Tokens after `count` rounds that all begin at the same place."""
    slots = state.lengths.shape[0]
    sampling, stops = Sampling.constant(0.0, slots), jnp.full((1,), -1, jnp.int32)
    if not drafts:
        state = dataclasses.replace(state, pending=Pending.empty(models, slots))

    def turn(number: jax.Array, at: DecodeState) -> DecodeState:
        del number
        requests = Requests(round_uniforms(at.keys, at.positions, models.block_size), sampling, stops)
        if drafts:
            after = drafting_round(models, at, requests, scheduler, sizes=sizes)[0]
        else:
            after = plain_round(models, at, requests, scheduler)[0]
            assert after.pending is not None
            after = catch_up(models, after, after.pending.full)
        return dataclasses.replace(after, lengths=at.lengths, finished=at.finished, stopped=at.stopped)

    return jax.lax.fori_loop(0, count, turn, state).tokens
