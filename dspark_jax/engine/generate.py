"""Batched speculative decoding in one jitted loop: draft, schedule, verify, commit.

`generate` is the front door for lists of prompts. Plain decoding is the same code with the drafter that drafts nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.engine import arguments
from dspark_jax.engine.admission import prompt_rows
from dspark_jax.engine.commit import is_stop
from dspark_jax.engine.models import Models
from dspark_jax.engine.result import DecodeResult, collect
from dspark_jax.engine.round import catch_up, drafting_round, plain_round
from dspark_jax.engine.sampling import Requests, request_keys, request_sampling, round_uniforms
from dspark_jax.engine.schedulers import Scheduler, check_scheduler, fixed, threshold
from dspark_jax.engine.sizes import verified_sizes
from dspark_jax.engine.state import DecodeState, Pending, RoundLog
from dspark_jax.ops.sampling import Sampling, sample
from dspark_jax.sharding import constrain, evenly, on_mesh_of, whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a batch of requests begins with.

    Attributes:
      tokens: [B, P] int32, padded on the right.
      lengths: [B], at least 1.
      limits: [B] length at which a request ends; at its prompt's length it is finished before it starts.
      keys: [B] request keys.
    """

    tokens: Any
    lengths: Any
    limits: Any
    keys: jax.Array


def prefill(
    models: Models, prompts: Prompts, requests: Requests, *, capacity: int, deferred: bool = False
) -> DecodeState:
    """Runs the prompts through the target, shows them to the drafter, and draws each request's first token.

    Args:
      models: the drafter absorbs the features of the whole prompt.
      prompts: of the batch; the keys are kept in the state.
      requests: `uniforms.next` draws the first token.
      capacity: C, at least limits + G: a round that starts below the limit writes G + 1 rows.
      deferred: the drafter does not read the prompt yet: its rows are pending. For one prompt alone.
    """
    batch, width = prompts.tokens.shape
    lengths, positions = prompts.lengths, jnp.broadcast_to(jnp.arange(width), prompts.tokens.shape)
    cache = models.target_cache(batch, capacity)
    output = models.target.forward(prompts.tokens, positions, cache, taps=models.taps, counts=lengths)
    last = jnp.take_along_axis(output.last_hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first = sample(models.target.unembed(last), requests.sampling, requests.uniforms.next)
    draft_cache, pending = models.draft_cache(batch, capacity), None
    if deferred:
        pending = Pending.of_prompt(models, output.features, lengths)
    else:
        draft_cache = models.drafter.extend(draft_cache, output.features, prompts.tokens, positions, lengths)

    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, capacity - width)))
    at = jnp.arange(capacity) == lengths[:, None]
    grown = jnp.minimum(lengths + 1, prompts.limits)
    stopped = is_stop(first, requests.stop_tokens) & (grown > lengths)
    return DecodeState(
        tokens=constrain(jnp.where(at, first[:, None], tokens), "batch", None),
        lengths=grown,
        prompt_lengths=lengths,
        limits=prompts.limits,
        finished=stopped | (grown >= prompts.limits),
        stopped=stopped,
        rounds=jnp.zeros_like(grown),
        keys=prompts.keys,
        target_cache=output.cache,
        draft_cache=draft_cache,
        pending=pending,
    )


def begin(models: Models, scheduler: Scheduler, state: DecodeState) -> DecodeState:
    """The state after `prefill` with what the scheduler's rounds carry along."""
    batch, pending = state.lengths.shape[0], state.pending
    if scheduler.alternates and pending is None:
        pending = Pending.empty(models, batch)
    history = scheduler.start(batch, models.block_size)
    return dataclasses.replace(state, history=history, pending=pending)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a compiled decoding run is specialised to, besides the shapes of its arguments.

    Attributes:
      capacity: C, rows of the caches.
      rounds: R, rows of the log.
      trace: log drafted tokens and confidences.
      sizes: of flat verification, see `round.drafting_round`.
    """

    capacity: int
    rounds: int
    trace: bool
    sizes: tuple[int, ...] = ()


def decode_shape(width: int, max_new_tokens: int, models: Models, *, trace: bool) -> Shape:
    """The shape for prompts padded to `width`: the last round starts below the budget and writes G + 1 rows.

    Budgets are rounded up to a multiple of 16, so that similar ones share an executable.
    """
    budget = -(-max_new_tokens // 16) * 16
    return Shape(width + budget + models.block_size, budget, trace)


Carry = tuple[DecodeState, RoundLog, jax.Array]  # of the loop; last the number of rounds so far


@functools.partial(jax.jit, static_argnames=("shape",))
def decode(
    models: Models, prompts: Prompts, sampling: Sampling, stop_tokens: jax.Array, scheduler: Scheduler, *, shape: Shape
) -> tuple[DecodeState, RoundLog]:
    """Decodes a padded batch to its end on the device; see `generate`, which calls this."""
    batch = prompts.tokens.shape[0]
    prompts = dataclasses.replace(prompts, tokens=constrain(prompts.tokens, "batch", None))
    models = models.for_decoding(batch_size=batch)
    first = Requests(round_uniforms(prompts.keys, prompts.lengths - 1, 0), sampling, stop_tokens)
    deferred = scheduler.alternates and models.defers_prompts(batch)
    state = begin(models, scheduler, prefill(models, prompts, first, capacity=shape.capacity, deferred=deferred))
    log = RoundLog.empty(shape.rounds, batch, models.block_size, trace=shape.trace, confidence=models.confident)

    def step(carry: Carry, *, drafts: bool = True) -> Carry:
        state, log, row = carry
        uniforms = round_uniforms(state.keys, state.positions, models.block_size)
        requests, active = Requests(uniforms, sampling, stop_tokens), ~state.finished
        if drafts:
            state, entry = drafting_round(models, state, requests, scheduler, sizes=shape.sizes)
        else:
            state, entry = plain_round(models, state, requests, scheduler)
        return state, log.put(row, entry, active), row + 1

    def running(carry: Carry) -> jax.Array:
        return ~jnp.all(carry[0].finished)

    def wants(carry: Carry, *, drafts: bool) -> jax.Array:
        return running(carry) & (scheduler.drafts_now(carry[0].history, ~carry[0].finished) == drafts)

    def plain(carry: Carry) -> jax.Array:
        assert carry[0].pending is not None
        return wants(carry, drafts=False) & ~carry[0].pending.full

    def alternate(carry: Carry) -> Carry:
        # Rounds of a kind follow each other, in loops of their own: branches would copy the caches in every round.
        carry = jax.lax.while_loop(functools.partial(wants, drafts=True), step, carry)
        plainly = functools.partial(step, drafts=False)
        state, log, row = jax.lax.while_loop(plain, plainly, carry)
        # Nobody drafts after the last token, and reading what is pending costs up to a plain round.
        return catch_up(models, state, running((state, log, row))), log, row

    body = alternate if scheduler.alternates else step
    state, log, _ = jax.lax.while_loop(running, body, (state, log, jnp.int32(0)))
    # The caches end here; returning them would only cost their copies.
    return whole((dataclasses.replace(state, target_cache=None, draft_cache=None, history=None, pending=None), log))


def generate(
    models: Models,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    keys: jax.Array | None = None,
    confidence_threshold: float = 0.0,
    scheduler: Scheduler | None = None,
    batch_size: int = 32,
    prompt_width: int = 0,
    verify_sizes: Sequence[int] | None = None,
    trace: bool = False,
    progress: Callable[[int], None] | None = None,
) -> DecodeResult:
    """Decodes prompts of any lengths; the distribution of the output is the target's, whatever the drafter.

    Prompts are sorted by length and decoded `batch_size` at a time; shapes are padded to a small ladder of sizes, so
    that few executables are compiled. How requests are grouped changes no greedy request's output, and no sampled one's
    under a rule that looks at one request alone (`fixed`, `threshold`).

    Temperature and filters are one value for all prompts or one per prompt, for drafter and target alike.

    Args:
      models: the target, and what drafts for it; without a drafter a round is one token. They decode on the mesh on
        which they lie.
      prompts: token ids, at least one per prompt.
      max_new_tokens: budget of each request.
      temperature: below 1e-5 is greedy.
      top_k: only so many of the likeliest tokens; 0 is off.
      top_p: only the smallest set of likeliest tokens with at least this probability; 1 is off.
      min_p: only tokens of at least this share of the likeliest one's probability; 0 is off.
      stop_tokens: ids that end a request; the stop token is the last one of the output.
      seed: request i draws with `request_keys(seed, i)`.
      keys: [N] keys, one per prompt, instead of a seed.
      confidence_threshold: drafts from the first one whose confidence is below this are not verified; 0 verifies all.
        Short for `schedulers.threshold`.
      scheduler: decides how many drafts are verified; None verifies all. What it holds per request is in the order of
        the prompts. The batch that `early_stop` and `lagged` count tokens of is the `batch_size` requests at a time.
      batch_size: most requests at a time.
      prompt_width: pads prompts to at least so many tokens and batches to `batch_size` rows, so that several calls
        share one executable; 0 picks both from the ladder.
      verify_sizes: sizes of the batch in which the scheduled tokens of all requests are verified: the smallest one that
        holds them, or G + 1 tokens of every request where none does. None chooses them by scheduler and batch.
      trace: keep drafted tokens and confidence logits of every round.
      progress: called with the number of requests that have just been finished.

    Raises:
      InputError: an empty prompt, a token outside the vocabulary, a budget below 1, more positions than the target
        has, a setting of the wrong type or out of range, or a scheduler for a drafter without a confidence head.
    """
    arguments.check_models(models)
    token_rows = prompt_rows(prompts, max_new_tokens, models.arch)
    batch_size = arguments.integer("batch_size", batch_size, least=1)
    prompt_width = arguments.integer("prompt_width", prompt_width, least=0)
    trace = arguments.boolean("trace", trace)
    if progress is not None and not callable(progress):
        raise InputError(f"progress is {type(progress).__name__}; give a function of a number, or None")
    sampling = request_sampling(len(token_rows), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scheduler = _scheduler(scheduler, confidence_threshold)
    check_scheduler(scheduler, models, len(token_rows))
    if keys is None:
        keys = request_keys(arguments.integer("seed", seed, least=0), jnp.arange(len(token_rows)))
    arguments.check_keys(keys, len(token_rows))
    # Some tokenizers name one that their model does not have; it ends nothing.
    stops = padded_stops(arguments.token_ids("stop_tokens", stop_tokens, arguments.MOST).tolist())
    order = sorted(range(len(token_rows)), key=lambda i: (len(token_rows[i]), i))
    parts = []
    with on_mesh_of(models):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = ladder(max(prompt_width, *(len(token_rows[i]) for i in chosen)))
            rows = evenly(batch_size if prompt_width else min(ladder(len(chosen)), batch_size))
            # Rows that fill up the batch are finished before they start.
            tokens = np.zeros((rows, width), np.int32)
            lengths, limits = np.ones(rows, np.int32), np.ones(rows, np.int32)
            for row, i in enumerate(chosen):
                lengths[row], limits[row] = len(token_rows[i]), len(token_rows[i]) + max_new_tokens
                tokens[row, : lengths[row]] = token_rows[i]
            picked = np.asarray(chosen + chosen[:1] * (rows - len(chosen)))
            own_keys, own_sampling, own_scheduler = _settings_of(picked, keys, sampling, scheduler)
            shape = dataclasses.replace(
                decode_shape(width, max_new_tokens, models, trace=trace),
                sizes=verified_sizes(verify_sizes, own_scheduler, rows, models.rows),
            )
            batch = Prompts(tokens, lengths, limits, own_keys)
            state, log = decode(models, batch, own_sampling, stops, own_scheduler, shape=shape)
            parts.append((chosen, jax.device_get((dataclasses.replace(state, keys=None), log))))
            if progress is not None:
                progress(len(chosen))
    return collect(parts, len(token_rows), models.block_size)


def _settings_of(
    picked: np.ndarray, keys: jax.Array, sampling: Sampling, scheduler: Scheduler
) -> tuple[jax.Array, Sampling, Scheduler]:
    """Keys, sampling and scheduler of some requests."""
    if np.array_equal(picked, np.arange(len(keys))):
        return keys, sampling, scheduler
    return _take(keys, sampling, scheduler, picked)


@jax.jit
def _take(keys: jax.Array, sampling: Sampling, scheduler: Scheduler, rows: jax.Array) -> Any:
    return keys[rows], sampling.take(rows), scheduler.take(rows)


def padded_stops(stop_tokens: Sequence[int]) -> np.ndarray:
    """Stop tokens [K] int32 as `decode` takes them, padded with -1 so that executables are shared."""
    return np.asarray([*stop_tokens] + [-1] * (4 - len(stop_tokens) % 4), np.int32)


def ladder(size: int) -> int:
    """The next size of 1, 2, 3, 4, 6, 8, 12, 16, ...: padding to it wastes at most a third."""
    power = 1 << max(size - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def _scheduler(scheduler: Scheduler | None, confidence_threshold: float) -> Scheduler:
    """The scheduler of a call, from either of its two arguments."""
    if not 0 <= arguments.real("confidence_threshold", confidence_threshold) <= 1:
        raise InputError(f"confidence_threshold={confidence_threshold} is no probability; use a value from 0 to 1")
    if not confidence_threshold:
        return fixed() if scheduler is None else scheduler
    if scheduler is not None:
        raise InputError(f"confidence_threshold={confidence_threshold} and a scheduler exclude each other; give one")
    return threshold(confidence_threshold)
