"""The device side of serving: slots that requests pass through, chunks of prompts, one round of all slots.

A mesh splits the slots into equal parts, one for each copy of the weights; chunks are read one for each part at a time,
each by the devices whose slot it goes into. Without a mesh there is one part.

A slot is a row of a `DecodeState`. While a prompt is being read, its slot is finished as far as decoding is concerned,
and `lengths` - 1 is the number of prompt tokens read so far. A round writes the cache rows of finished slots too, from
`lengths` - 1 on: rows that the next chunk overwrites before anything can see them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.engine.commit import append, is_stop
from dspark_jax.engine.generate import begin
from dspark_jax.engine.models import Models
from dspark_jax.engine.round import decode_round
from dspark_jax.engine.sampling import Requests, fold_keys, round_uniforms
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.engine.state import DecodeState, Round
from dspark_jax.ops.sampling import Sampling, sample
from dspark_jax.sharding import constrain, parts_of, per_device, whole
from dspark_jax.target.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """All requests that are being decoded, and how.

    Attributes:
      state: one row per slot.
      sampling: settings per slot, every filter an array.
      stop_tokens: [B, K] per slot; negative ids are padding.
    """

    state: DecodeState
    sampling: Sampling
    stop_tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a prompt for a slot of each of P parts, and the requests' settings; [P] unless said otherwise.

    Attributes:
      tokens: [P, W] int32, padded.
      count: how many of them are real.
      start: position of the first one, a multiple of W.
      slot: where the request lives, counted within the part; -1 is nowhere: the part has no chunk.
      prompt_length: of the whole prompt; the chunk that reaches it draws the first token.
      limit: length at which the request ends.
      seed: of the request's key, with `random_stream`.
      random_stream: number of the request among those with that seed.
      temperature: see `Sampling`, as the filters that follow.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.
      stop_tokens: [P, K] int32, padded with negative ids.
    """

    tokens: Any
    count: Any
    start: Any
    slot: Any
    prompt_length: Any
    limit: Any
    seed: Any
    random_stream: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    stop_tokens: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Committed:
    """What a launch has committed, small enough to be fetched every time.

    Attributes:
      tokens: [B, T] new tokens; T is G + 1 for a round and 1 for chunks, where B is P.
      counts: [B] how many of them are real.
      finished: [B] bool.
      stopped: [B] bool, finished by a stop token.
      round: what the round did, or None for chunks.
    """

    tokens: jax.Array
    counts: jax.Array
    finished: jax.Array
    stopped: jax.Array
    round: Round | None


@dataclasses.dataclass(frozen=True)
class Mode:
    """What all requests of a round have in common; static, one executable each.

    Attributes:
      greedy: every temperature is 0.
      filtered: a request uses top-k, top-p or min-p.
    """

    greedy: bool = True
    filtered: bool = False

    def sampling(self, settings: Sampling) -> Sampling:
        """The settings without what nobody uses; the same tokens for less work."""
        if self.greedy:
            return Sampling(settings.temperature, greedy=True)
        return settings if self.filtered else Sampling(settings.temperature)


SHARED = -1
"""In the place of an axis: no request has values of its own."""


def request_axes(make: Callable[[int], Any]) -> Any:
    """The axis of the requests in every leaf of what is made for so many of them, or `SHARED`.

    Found by asking for two sizes.
    """
    two, three = (jax.eval_shape(lambda count=count: make(count)) for count in (2, 3))

    def axis(a: Any, b: Any) -> int:
        differing = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        if len(differing) > 1:
            raise ValueError(f"a leaf of shape {a.shape} for 2 requests has several axes for them")
        return differing[0] if differing else SHARED

    return jax.tree.map(axis, two, three)


def batch_axes(init_cache: Callable[[int, int], Any], like: Any = None) -> Any:
    """The axis of the requests in every leaf of a cache.

    With `like` the axes are in a tree as that cache is one, which may differ from a small one in what is static.

    Raises:
      ValueError: a leaf has no such axis.
    """
    axes = request_axes(lambda size: init_cache(size, 8))
    if SHARED in jax.tree.leaves(axes):
        raise ValueError("a cache leaf has no axis of its own for the requests")
    return axes if like is None else jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(axes))


def history_axes(scheduler: Scheduler, block_size: int) -> Any:
    """The axis of the requests in every leaf of a scheduler's history, or `SHARED`."""
    return request_axes(lambda count: scheduler.start(count, block_size))


Lay = Callable[..., Any]
"""`lay(array, *logical axes)`: pins an array in a program, lays out a shape, or does something else with it."""


def parts(slots: int) -> int:
    """P, parts into which the mesh that is set splits so many slots."""
    return parts_of("batch") if slots % parts_of("batch") == 0 else 1


def take_rows(values: jax.Array, *axes: str | None, slot: jax.Array) -> jax.Array:
    """Row slot[p] of every part, on its own devices: `values` with P in the place of B. Where slot is -1, any row."""
    axis = axes.index("batch")

    def here(values: jax.Array, slot: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.dynamic_slice_in_dim(values, jnp.maximum(slot[0], 0), 1, axis),)

    taken = (*values.shape[:axis], len(slot), *values.shape[axis + 1 :])
    return per_device(here, (axes, ("batch",)), (axes,), (taken,))(values, slot)[0]


def put_rows(values: jax.Array, rows: jax.Array, *axes: str | None, slot: jax.Array) -> jax.Array:
    """`values` with `rows`, which have P in the place of B, as row slot[p] of every part; -1 leaves a part alone."""
    axis = axes.index("batch")

    def here(values: jax.Array, rows: jax.Array, slot: jax.Array) -> tuple[jax.Array]:
        at = jnp.maximum(slot[0], 0)
        old = jax.lax.dynamic_slice_in_dim(values, at, 1, axis)
        rows = jnp.where(slot[0] < 0, old, rows.astype(values.dtype))
        return (jax.lax.dynamic_update_slice_in_dim(values, rows, at, axis),)

    return per_device(here, (axes, axes, ("batch",)), (axes,))(values, rows, slot)[0]


def split_cache(cache: Any, axes: Any, lay: Lay = constrain) -> Any:
    """A cache with the requests split over the mesh, and, where it is a target's layers', the heads.

    Args:
      cache: of a target or drafter.
      axes: of the requests in each of its leaves, see `batch_axes`.
      lay: what is done with each leaf.
    """

    def one(part: Any, axis: Any) -> Any:
        return part.on_mesh(lay) if isinstance(part, LayerCache) else _split(part, axis, lay)

    return jax.tree.map(one, cache, axes, is_leaf=lambda leaf: isinstance(leaf, LayerCache))


def _put_in_cache(cache: Any, own: Any, axes: Any, slot: jax.Array) -> Any:
    """A cache with what `own` holds of one request of each part."""
    names: list[tuple[str | None, ...]] = []
    split_cache(cache, axes, lambda leaf, *axes: names.append(axes))
    leaves = [
        put_rows(values, rows, *leaf, slot=slot)
        for values, rows, leaf in zip(jax.tree.leaves(cache), jax.tree.leaves(own), names, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(cache), leaves)


def _split(values: Any, axis: int, lay: Lay) -> Any:
    return lay(values, *("batch" if i == axis else None for i in range(values.ndim)))


def pin(models: Models, scheduler: Scheduler, slots: Slots, lay: Lay = constrain) -> Slots:
    """Keeps the slots split over the batch axes of the mesh, and caches by heads, whatever the compiler would do.

    For `lay` see `split_cache`.
    """

    def split(values: Any, axis: int = 0) -> Any:
        return _split(values, axis, lay)

    state = slots.state
    axes = batch_axes(models.target_cache, state.target_cache), batch_axes(models.draft_cache, state.draft_cache)
    caches: dict[str, Any] = {
        "target_cache": split_cache(state.target_cache, axes[0], lay),
        "draft_cache": split_cache(state.draft_cache, axes[1], lay),
        "history": jax.tree.map(split, state.history, history_axes(scheduler, models.block_size)),
        "pending": jax.tree.map(split, state.pending),
    }
    fields = ("tokens", "lengths", "prompt_lengths", "limits", "finished", "stopped", "rounds", "keys")
    state = dataclasses.replace(state, **{name: split(getattr(state, name)) for name in fields}, **caches)
    return Slots(state, jax.tree.map(split, slots.sampling), split(slots.stop_tokens))


@functools.partial(jax.jit, static_argnames=("count", "rows", "stops"))
def open_slots(models: Models, scheduler: Scheduler, *, count: int, rows: int, stops: int) -> Slots:
    """Empty slots.

    Args:
      models: give the shapes of their caches.
      scheduler: gives the history of a new request.
      count: B.
      rows: C, positions per slot, with room for what a round or a chunk writes beyond a request's last token.
      stops: K, stop tokens per request.
    """
    numbers = jnp.zeros((count,), jnp.int32)
    state = begin(models, scheduler, DecodeState.empty(models, count, rows))
    zeros = jnp.zeros((count,), jnp.float32)
    sampling = Sampling(zeros, numbers, zeros + 1, zeros)
    return pin(models, scheduler, Slots(state, sampling, jnp.full((count, stops), -1, jnp.int32)))


@functools.partial(jax.jit, donate_argnames=("slots",))
def prefill_chunk(models: Models, slots: Slots, chunk: Chunk, scheduler: Scheduler) -> tuple[Slots, Committed]:
    """Reads a chunk of a prompt into a slot of each part; the last chunk draws the first token and lets a slot decode.

    The slot's settings and history are written with every chunk, since the rounds in between move the history on.
    What a drafter's cache remembers of the slot's last request is cleared with the first one; the target's cache and
    the token buffer need no clearing, stale rows are never visible.
    """
    state, (count, width) = slots.state, chunk.tokens.shape
    chunk = jax.tree.map(lambda values: constrain(jnp.asarray(values), "batch", *(None,) * (values.ndim - 1)), chunk)
    positions = chunk.start[:, None] + jnp.arange(width)
    take = functools.partial(take_rows, slot=chunk.slot)
    axes = batch_axes(models.target_cache, state.target_cache)
    own = split_cache(state.target_cache, axes, take)
    output = models.target.forward(chunk.tokens, positions, own, taps=models.taps, counts=chunk.count)
    target_cache = _put_in_cache(state.target_cache, output.cache, axes, chunk.slot)
    draft_cache = _extend_rows(models, state, output.features, positions, chunk)

    def put(values: jax.Array, rows: Any) -> jax.Array:
        axes = ("batch", *(None,) * (values.ndim - 1))
        return put_rows(values, jnp.broadcast_to(rows, (count, *values.shape[1:])), *axes, slot=chunk.slot)

    keys = fold_keys(jax.vmap(jax.random.key)(chunk.seed), chunk.random_stream)
    last = jnp.take_along_axis(output.last_hidden, jnp.maximum(chunk.count - 1, 0)[:, None, None], axis=1)[:, 0]
    settings = Sampling(chunk.temperature, chunk.top_k, chunk.top_p, chunk.min_p)
    uniforms = round_uniforms(keys, chunk.prompt_length - 1, 0)
    first = sample(models.target.unembed(last), settings, uniforms.next)

    read = chunk.start + chunk.count
    complete = (read >= chunk.prompt_length) & (chunk.slot >= 0)
    stopped = complete & is_stop(first, chunk.stop_tokens)
    finished = stopped | (chunk.prompt_length + 1 >= chunk.limit)
    tokens = append(take(state.tokens, "batch", None), chunk.start, chunk.tokens)
    tokens = append(tokens, chunk.prompt_length, first[:, None])

    def put_history(values: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        axes = ["batch" if i == axis else None for i in range(values.ndim)]
        return values if axis == SHARED else put_rows(values, new, *axes, slot=chunk.slot)

    history = jax.tree.map(
        put_history,
        state.history,
        scheduler.start(count, models.block_size),
        history_axes(scheduler, models.block_size),
    )
    pending = state.pending
    if pending is not None:  # what the slot's last request has left
        pending = dataclasses.replace(pending, counts=put(pending.counts, 0))
    state = dataclasses.replace(
        state,
        tokens=put(state.tokens, tokens),
        lengths=put(state.lengths, read + 1),
        prompt_lengths=put(state.prompt_lengths, chunk.prompt_length),
        limits=put(state.limits, chunk.limit),
        finished=put(state.finished, finished | ~complete),
        stopped=put(state.stopped, stopped),
        rounds=put(state.rounds, 0),
        keys=put(state.keys, keys),
        target_cache=target_cache,
        draft_cache=draft_cache,
        history=history,
        pending=pending,
    )
    sampling = jax.tree.map(put, slots.sampling, settings)
    slots = Slots(state, sampling, put(slots.stop_tokens, chunk.stop_tokens))
    report = Committed(first[:, None], complete.astype(jnp.int32), finished, stopped, None)
    return pin(models, scheduler, slots), whole(report)


def _extend_rows(models: Models, state: DecodeState, features: jax.Array, positions: jax.Array, chunk: Chunk) -> Any:
    """The drafter's cache after it has absorbed a chunk in a slot of each part."""
    cache, axes = state.draft_cache, batch_axes(models.draft_cache, state.draft_cache)
    own = split_cache(cache, axes, functools.partial(take_rows, slot=chunk.slot))
    empty = models.draft_cache(len(chunk.start), state.tokens.shape[1])

    def begin(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        begins = (chunk.start == 0).reshape([-1 if i == axis else 1 for i in range(old.ndim)])
        return jnp.where(begins, new, old)

    own = jax.tree.map(begin, own, empty, axes)
    own = models.drafter.extend(own, features, chunk.tokens, positions, chunk.count)
    return _put_in_cache(cache, own, axes, chunk.slot)


@functools.partial(jax.jit, static_argnames=("mode", "sizes"), donate_argnames=("slots",))
def serve_round(
    models: Models,
    slots: Slots,
    released: jax.Array,
    scheduler: Scheduler,
    *,
    mode: Mode,
    sizes: tuple[int, ...] = (),
) -> tuple[Slots, Committed]:
    """One decoding round of all slots.

    Args:
      models: with the weights that decoding wants here (`Models.for_decoding`).
      slots: donated.
      released: [B] bool, slots whose requests the host has ended (cancelled, or at a stop string).
      scheduler: decides how many drafts are verified.
      mode: must hold for all requests that are decoding.
      sizes: of flat verification, see `round.drafting_round`.
    """
    before = dataclasses.replace(slots.state, finished=slots.state.finished | released)
    uniforms = round_uniforms(before.keys, before.positions, models.block_size)
    requests = Requests(uniforms, mode.sampling(slots.sampling), slots.stop_tokens)
    after, entry = decode_round(models, before, requests, scheduler=scheduler, sizes=sizes)
    at = before.lengths[:, None] + jnp.arange(models.rows)
    tokens = jnp.take_along_axis(after.tokens, jnp.minimum(at, after.tokens.shape[1] - 1), axis=1)
    report = Committed(tokens, after.lengths - before.lengths, after.finished, after.stopped, entry)
    return pin(models, scheduler, dataclasses.replace(slots, state=after)), whole(report)
