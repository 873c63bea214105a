"""`speculative_verify` as Pallas kernels for TPUs: every row of logits is read once, and the two rows at the end of
each request's accepted prefix once more. Compiled for TPUs, and run in interpret mode; never run on a TPU.

    stats      grid (groups of 8 rows, tiles of V)   of a row: maximum, its first index, sum of exponentials, and the
                                                     logit of the token that was drafted after it
    surplus    grid (B,)                             sums of q and of (q - p)+ over parts of the vocabulary
    slices     grid (B,)                             the logits of the part that was drawn

What is accepted follows from the stats, the part from the sums, and the token from the slices, each in a few small
fusions of XLA; a gather of single logits or rows by XLA would read or copy all of them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dspark_jax.ops import mosaic
from dspark_jax.ops.mosaic import LANES, MASKED, numbers
from dspark_jax.ops.sampling import FAR, GREEDY_BELOW, Sampling, draw_inside, draw_part, is_below
from dspark_jax.ops.speculative_verify.rule import FLOOR, acceptance_probabilities, accepted_prefix
from dspark_jax.sharding import parts_of, per_device, share

_ROWS = 8
"""Of a group: what a register holds of one lane."""


class Sizes(NamedTuple):
    """Tokens of a tile of the stats, at most (1.3 MB of a group's logits); registers that they take at once; tokens of
    a part."""

    tile: int = 40960
    strip: int = 16
    part: int = 512


_SIZES = Sizes()


class _Stats(NamedTuple):
    """Of rows of logits, [..] each."""

    top: jax.Array
    total: jax.Array
    best: jax.Array
    chosen: jax.Array


def speculative_verify(
    target_logits: jax.Array,
    draft_logits: jax.Array,
    first_rows: jax.Array | None,
    tokens: jax.Array,
    lengths: jax.Array,
    accept: jax.Array,
    following: jax.Array,
    sampling: Sampling,
    *,
    sizes: Sizes = _SIZES,
) -> tuple[jax.Array, jax.Array]:
    """See `api.speculative_verify`. Over a mesh, devices split the requests. `sizes` is for tests."""
    b, g, v = draft_logits.shape
    mosaic.check(
        there_are_filters=not sampling.filtered,
        the_vocabulary_is_no_multiple_of_128_up_to_524288=v % LANES == 0 and v <= _ROWS * LANES * sizes.part,
        the_logits_are_not_float32=target_logits.dtype == draft_logits.dtype == jnp.float32,
        there_are_too_many_requests=share("batch", b) <= 1024,
        the_vocabulary_is_split_over_devices=parts_of("vocab") == 1,
        requests_or_flat_rows_are_not_split_evenly=parts_of("batch") == 1
        or (first_rows is None and b % parts_of("batch") == 0),
    )
    sizes = sizes._replace(part=min(sizes.part, v))
    if parts_of("batch") == 1:
        first = jnp.arange(b) * (g + 1) if first_rows is None else first_rows
        return _verify_here(
            target_logits, draft_logits.swapaxes(0, 1), first, tokens, lengths, accept, following,
            sampling.temperature, greedy=sampling.greedy, sizes=sizes,
        )  # fmt: skip

    def here(target: jax.Array, draft: jax.Array, tokens: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jnp.arange(tokens.shape[0]) * (g + 1)
        return _verify_here(target, draft, first, tokens, *rest, greedy=sampling.greedy, sizes=sizes)

    batch, flat = ("batch",), ("batch", None)
    inputs = (flat, (None, "batch", None), flat, batch, ("batch", None, None), flat, batch)
    arrays = target_logits, draft_logits.swapaxes(0, 1), tokens, lengths, accept, following, sampling.temperature
    accepted, token = per_device(here, inputs, (batch, batch))(*arrays)
    return accepted, token


def _verify_here(
    target: jax.Array, draft: jax.Array, first: jax.Array, tokens: jax.Array, lengths: jax.Array, accept: jax.Array,
    following: jax.Array, temperature: jax.Array, *, greedy: bool, sizes: Sizes,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """On one device: target [T, V], draft [G, B, V], `first` rows of the requests, ascending."""
    (g, b, v), t = draft.shape, target.shape[0]
    rows = jnp.minimum(first[:, None] + jnp.arange(g + 1), t - 1)  # [B, G + 1]
    is_greedy = temperature < GREEDY_BELOW
    factor = 1.0 / jnp.where(is_greedy, 1.0, temperature)

    owner = jnp.maximum(jnp.sum(jnp.arange(t)[:, None] >= first, axis=1) - 1, 0)
    step = jnp.arange(t) - first[owner]
    drafted = (step >= 0) & (step < g)
    after = jnp.where(drafted, tokens[owner, jnp.clip(step, 0, g - 1)], -1) if g else jnp.full((t,), -1)
    flat_stats = _stats(target, after, factor[owner], weigh=not greedy, sizes=sizes)
    of_target = _Stats(*(x[rows] for x in flat_stats))
    if greedy:
        accepted = accepted_prefix(tokens == of_target.best[:, :g], lengths)
        return accepted, _at(of_target.best, accepted)

    accepted, ends = jnp.zeros_like(lengths), []
    if g:
        flat, draft_rows = draft.reshape(g * b, v), jnp.arange(g) * b + jnp.arange(b)[:, None]
        flat_stats = _stats(flat, tokens.T.reshape(-1), jnp.tile(factor, g), weigh=True, sizes=sizes)
        of_draft = _Stats(*(x[draft_rows] for x in flat_stats))
        scored = [_scores(x, tokens, factor, is_greedy) for x in (of_draft, _Stats(*(x[:, :g] for x in of_target)))]
        accepted = accepted_prefix(is_below(accept, acceptance_probabilities(*scored)), lengths)
        ends = [_Row.at(flat, draft_rows, of_draft, jnp.minimum(accepted, g - 1))]
        # After all drafts nothing is subtracted: as if no logit of the drafter came near its largest.
        ends = [ends[0]._replace(top=jnp.where(accepted < lengths, ends[0].top, -MASKED))]
    ends = [_Row.at(target, rows, of_target, accepted), *ends]
    return accepted, jnp.where(is_greedy, _at(of_target.best, accepted), _draw(ends, factor, following, sizes.part))


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """Entries [B] at index [B] of [B, K]."""
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]


def _scores(stats: _Stats, tokens: jax.Array, factor: jax.Array, is_greedy: jax.Array) -> jax.Array:
    """Probabilities [B, G] of the drafts."""
    soft = jnp.exp((stats.chosen - stats.top) * factor[:, None]) / stats.total
    return jnp.where(is_greedy[:, None], (stats.best == tokens).astype(jnp.float32), soft)


class _Row(NamedTuple):
    """A row of logits [M, V] for each request, [B] each: its number, its maximum, and 1 / its sum of exponentials."""

    logits: jax.Array
    number: jax.Array
    top: jax.Array
    share: jax.Array

    @classmethod
    def at(cls, logits: jax.Array, rows: jax.Array, stats: _Stats, index: jax.Array) -> "_Row":
        """The rows [B, K] at index [B]."""
        return cls(logits, *(_at(x, index) for x in (rows.astype(jnp.int32), stats.top, 1.0 / stats.total)))


def _draw(ends: Sequence[_Row], factor: jax.Array, following: jax.Array, part: int) -> jax.Array:
    """Tokens [B] drawn from (q - p)+, or from q where nothing is left; `ends` are the rows of q and of p, or of q."""
    sums = _surplus(ends, factor, part)
    if len(ends) == 2:
        left = jnp.sum(sums[:, 1], axis=-1) > FLOOR
        ends = [ends[0], ends[1]._replace(top=jnp.where(left, ends[1].top, -MASKED))]
        sums = jnp.where(left[:, None, None], sums[:, 1:], sums[:, :1])
    drawn = draw_part(sums[:, 0], following)
    begin = jnp.minimum(drawn.index * part, ends[0].logits.shape[1] - part)  # the last part may be shorter
    weights = _slices(ends, factor, begin, part)
    weights = jnp.where(begin[:, None] + jnp.arange(part) >= drawn.index[:, None] * part, weights, 0.0)
    return begin + draw_inside(weights, drawn)


def _stats(logits: jax.Array, tokens: jax.Array, factor: jax.Array, *, weigh: bool, sizes: Sizes) -> _Stats:
    """Stats [M] of all rows of logits [M, V], with the logits of tokens [M]; without `weigh` no sums."""
    m, v = logits.shape
    groups, tiles = pl.cdiv(m, _ROWS), pl.cdiv(v, sizes.tile)
    tile = pl.cdiv(pl.cdiv(v, tiles), LANES) * LANES
    table = jnp.pad(tokens.astype(jnp.int32), (0, groups * _ROWS - m), constant_values=-1)
    one = pl.BlockSpec((_ROWS, 1), lambda i, j, _: (i, 0))
    kinds = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    found = mosaic.call(
        functools.partial(_stats_kernel, v=v, strip=sizes.strip, weigh=weigh),
        [table],
        [logits, factor[:, None]],
        [pl.BlockSpec((_ROWS, tile), lambda i, j, _: (i, j)), one],
        [jax.ShapeDtypeStruct((m, 1), kind) for kind in kinds],
        [one] * 4,
        grid=(groups, tiles),
        parallel=1,
        scratch=[pltpu.VMEM((_ROWS, LANES), kind) for kind in kinds],
        exponentials=m * v if weigh else 0,
    )
    return _Stats(*(x[:, 0] for x in found))


def _stats_kernel(
    tokens_ref: Any, logits_ref: Any, factor_ref: Any, top_out: Any, total_out: Any, best_out: Any, chosen_out: Any,
    top_ref: Any, total_ref: Any, best_ref: Any, chosen_ref: Any, *, v: int, strip: int, weigh: bool,
) -> None:  # fmt: skip
    """References: logits [8, tile], factor and results [8, 1]; scratch [8, 128], lane by lane. `best` counts registers
    until the end."""
    group, turn = pl.program_id(0), pl.program_id(1)
    tile = logits_ref.shape[1]
    factor = jnp.broadcast_to(factor_ref[...], (_ROWS, LANES))
    lane = numbers((_ROWS, LANES), 1)

    @pl.when(turn == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        for ref in (total_ref, best_ref, chosen_ref):
            ref[...] = jnp.zeros_like(ref)

    def add(first: Any, count: int, carry: Any) -> Any:
        """Takes `count` registers from number `first` of the tile on."""
        top, total, best = carry
        found = [logits_ref[:, pl.ds(pl.multiple_of((first + i) * LANES, LANES), LANES)] for i in range(count)]
        peak = functools.reduce(jnp.maximum, found)
        number = jnp.full(lane.shape, count, jnp.int32)
        for i in reversed(range(count)):
            number = jnp.where(found[i] == peak, i, number)
        best = jnp.where(peak > top, turn * (tile // LANES) + first + number, best)
        new = jnp.maximum(top, peak)
        if weigh:
            total = total * jnp.exp((top - new) * factor)
            total += functools.reduce(jnp.add, [jnp.exp((x - new) * factor) for x in found])
        return new, total, best

    registers = jnp.minimum(v - turn * tile, tile) // LANES
    strips = registers // strip
    carry = top_ref[...], total_ref[...], best_ref[...]
    carry = lax.fori_loop(0, strips, lambda i, carry: add(i * strip, strip, carry), carry)
    carry = lax.fori_loop(strips * strip, registers, lambda i, carry: add(i, 1, carry), carry)
    top_ref[...], total_ref[...], best_ref[...] = top, total, best = carry

    for row in range(_ROWS):
        place = tokens_ref[group * _ROWS + row] - turn * tile

        @pl.when((place >= 0) & (place < tile))
        def _(row: int = row, place: Any = place) -> None:
            start = pl.multiple_of(place // LANES * LANES, LANES)
            x = logits_ref[pl.ds(row, 1), pl.ds(start, LANES)]
            chosen_ref[pl.ds(row, 1), :] = jnp.where(numbers((1, LANES), 1) == place - start, x, 0.0)

    @pl.when(turn == pl.num_programs(1) - 1)
    def _() -> None:
        most = jnp.max(top, axis=1, keepdims=True)
        top_out[...] = most
        total_out[...] = jnp.sum(total * jnp.exp((top - most) * factor), axis=1, keepdims=True)
        token = jnp.min(jnp.where(top == most, best * LANES + lane, FAR), axis=1, keepdims=True)
        best_out[...] = jnp.minimum(token, v - 1)
        chosen_out[...] = jnp.sum(chosen_ref[...], axis=1, keepdims=True)


def _weights(logits: Sequence[jax.Array], settings: Sequence[Any]) -> list[jax.Array]:
    """[q, (q - p)+], or [q], from logits of both or one; settings: factor, and each one's maximum and share.

    Sums and slices take the same values, bit by bit: a part with a sum has a token.
    """
    factor, *rest = settings
    found = [jnp.exp((x - rest[2 * i]) * factor) * rest[2 * i + 1] for i, x in enumerate(logits)]
    return [found[0], jnp.maximum(found[0] - found[1], 0.0)] if len(found) == 2 else found


def _surplus(ends: Sequence[_Row], factor: jax.Array, part: int) -> jax.Array:
    """Sums [B, 1 or 2, P] of `_weights` over the parts of the vocabulary."""
    b, v, n = factor.shape[0], ends[0].logits.shape[1], len(ends)
    parts = pl.cdiv(v, _ROWS * part)  # of each line
    settings = jnp.stack([factor, *(x for end in ends for x in (end.top, end.share))])
    everywhere = pl.BlockSpec(memory_space=pl.ANY)
    found = mosaic.call(
        functools.partial(_surplus_kernel, v=v, part=part),
        [end.number for end in ends],
        [settings, *(end.logits for end in ends)],
        [pl.BlockSpec(memory_space=pltpu.SMEM), *[everywhere] * n],
        jax.ShapeDtypeStruct((b, n, _ROWS, LANES), jnp.float32),
        pl.BlockSpec((None, n, _ROWS, LANES), lambda i, *_: (i, 0, 0, 0)),
        grid=(b,),
        parallel=0,
        scratch=[pltpu.VMEM((2, n, _ROWS, parts * part), jnp.float32), pltpu.SemaphoreType.DMA((2,))],
        exponentials=n * b * v,
        moved=n * b * v * 4,
    )
    return found[..., :parts].reshape(b, n, _ROWS * parts)


def _surplus_kernel(*refs: Any, v: int, part: int) -> None:
    """A row of V logits lies in eight lines, so that it fills registers; the next request's are fetched meanwhile.

    References: row numbers, settings, logits [M, V] in HBM (of q and p, or of q); sums [n, 8, 128], of which lane i is
    part i of each line; scratch [2, n, 8, line], semaphores [2].
    """
    *given, out_ref, lines_ref, arrived = refs
    n = len(given) // 2
    row_refs, settings_ref, logits_refs = given[:n], given[n], given[n + 1 :]
    request, length = pl.program_id(0), lines_ref.shape[3]

    def copies(request: Any) -> list[Any]:
        slot, found = lax.rem(request, 2), []
        for i, (row_ref, logits_ref) in enumerate(zip(row_refs, logits_refs, strict=True)):
            for line, start in enumerate(range(0, v, length)):
                size = min(length, v - start)
                there = logits_ref.at[pl.ds(row_ref[request], 1), pl.ds(start, size)]
                here = lines_ref.at[slot, i, pl.ds(line, 1), pl.ds(0, size)]
                found.append(pltpu.make_async_copy(there, here, arrived.at[slot]))
        return found

    def fetch(request: Any) -> None:
        for copy in copies(request):
            copy.start()

    pl.when(request == 0)(lambda: fetch(request))
    pl.when(request + 1 < pl.num_programs(0))(lambda: fetch(request + 1))
    for copy in copies(request):
        copy.wait()
    settings = [settings_ref[i, request] for i in range(1 + 2 * n)]
    lane = numbers((_ROWS, LANES), 1)
    left = v - numbers((_ROWS, LANES), 0) * length - lane  # tokens from this lane of the line's first register on
    slot = lax.rem(request, 2)

    def add(number: Any, sums: Any) -> Any:
        totals = [jnp.zeros(lane.shape, jnp.float32)] * n
        for i in range(part // LANES):
            start = pl.multiple_of(number * part + i * LANES, LANES)
            found = _weights([lines_ref[slot, j, :, pl.ds(start, LANES)] for j in range(n)], settings)
            totals = [x + jnp.where(start < left, y, 0.0) for x, y in zip(totals, found, strict=True)]
        sums_here = [jnp.sum(x, axis=1, keepdims=True) for x in totals]
        return tuple(jnp.where(lane == number, x, y) for x, y in zip(sums_here, sums, strict=True))

    sums = lax.fori_loop(0, length // part, add, (jnp.zeros(lane.shape, jnp.float32),) * n)
    for i, x in enumerate(sums):
        out_ref[i] = x


def _slices(ends: Sequence[_Row], factor: jax.Array, begin: jax.Array, part: int) -> jax.Array:
    """The last of `_weights` [B, part] from the tokens begin [B] on, multiples of 128."""
    b, n = factor.shape[0], len(ends)
    settings = [x[:, None] for x in (factor, *(x for end in ends for x in (end.top, end.share)))]
    column = pl.BlockSpec((b, 1), lambda *_: (0, 0))
    return mosaic.call(
        _slices_kernel,
        [begin.astype(jnp.int32), *(end.number for end in ends)],
        [*settings, *(end.logits for end in ends)],
        [*[column] * len(settings), *[pl.BlockSpec(memory_space=pl.ANY)] * n],
        jax.ShapeDtypeStruct((b, part), jnp.float32),
        pl.BlockSpec((b, part), lambda *_: (0, 0)),
        grid=(1,),
        parallel=0,
        scratch=[pltpu.VMEM((n, b, part), jnp.float32), pltpu.SemaphoreType.DMA(())],
        exponentials=n * b * part,
        moved=n * b * part * 4,
    )


def _slices_kernel(begin_ref: Any, *refs: Any) -> None:
    """References: row numbers; settings [B, 1], logits [M, V] in HBM; weights [B, part]; scratch [n, B, part]."""
    *given, out_ref, slices_ref, arrived = refs
    n, (b, part) = (len(given) - 1) // 4, out_ref.shape
    row_refs, setting_refs, logits_refs = given[:n], given[n : 3 * n + 1], given[3 * n + 1 :]

    def copies(request: Any) -> list[Any]:
        start = pl.multiple_of(begin_ref[request], LANES)
        return [
            pltpu.make_async_copy(
                logits_ref.at[pl.ds(row_ref[request], 1), pl.ds(start, part)],
                slices_ref.at[i, pl.ds(request, 1), :],
                arrived,
            )
            for i, (row_ref, logits_ref) in enumerate(zip(row_refs, logits_refs, strict=True))
        ]

    def each(act: Any) -> None:
        lax.fori_loop(0, b, lambda request, _: [act(copy) for copy in copies(request)] and None, None)

    each(lambda copy: copy.start())
    each(lambda copy: copy.wait())
    out_ref[...] = _weights([slices_ref[i] for i in range(n)], [ref[...] for ref in setting_refs])[-1]
