"""`speculative_verify` as Pallas kernels for NVIDIA GPUs; filters are left to XLA.

    stats      grid (parts of V, rows)   maximum, its first index and sum of exponentials of a part of a row of logits;
                                         rows that do not count are not read
    surplus    grid (parts, B)           sum of (q - p)+ over a part of the rows at the end of the accepted prefix
    pick       grid (B,)                 the next token: the part first, then the token in it

What is accepted follows from the stats and the drafted tokens' own logits, in a few small fusions of XLA.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dspark_jax.ops import triton
from dspark_jax.ops.sampling import FAR, GREEDY_BELOW, Sampling, is_below
from dspark_jax.ops.speculative_verify.rule import FLOOR, acceptance_probabilities, accepted_prefix
from dspark_jax.ops.triton import MASKED, load, numbers, power_of_two
from dspark_jax.ops.triton_sampling import draw_inside, draw_part, exponents, merged, one_spec
from dspark_jax.sharding import devices_here

_SIZE = 1024
"""Tokens of a part."""


class _Stats(NamedTuple):
    """Of rows of logits, part by part: [rows, P]."""

    top: jax.Array
    total: jax.Array
    first: jax.Array


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
    size: int = _SIZE,
) -> tuple[jax.Array, jax.Array]:
    """See `api.speculative_verify`. `size` is for tests."""
    b, g, v = draft_logits.shape
    parts = pl.cdiv(v, size)
    triton.check(
        there_are_filters=not sampling.filtered,
        the_vocabulary_is_too_large=parts <= 2047,
        logits_of_several_devices_are_not_told_apart=devices_here() == 1,
    )
    last_row = target_logits.shape[0] - 1
    first_rows = jnp.arange(b) * (g + 1) if first_rows is None else first_rows
    rows = jnp.minimum(first_rows[:, None] + jnp.arange(g + 1), last_row)  # [B, G + 1]
    real = jnp.arange(g + 1) <= lengths[:, None]
    factor = exponents(sampling.temperature)
    target = _stats(target_logits, rows, real, factor, size)  # [B, G + 1, P]
    best = _first_largest(target)
    if sampling.greedy:
        accepted = accepted_prefix(tokens == best[:, :g], lengths)
        return accepted, jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0]

    greedy = sampling.temperature < GREEDY_BELOW
    if g == 0:
        ends = _Stats(*(values[:, 0] for values in target))
        most, sums = merged(ends.top, ends.total, factor)
        pair = [target_logits, rows[:, 0], most, jnp.sum(sums, axis=-1)]
        return jnp.zeros_like(lengths), jnp.where(greedy, best[:, 0], _pick(pair, sums, following, factor, size))
    flat = draft_logits.swapaxes(0, 1).reshape(g * b, v)  # positions first, as drafters leave them
    draft_rows = jnp.arange(g) * b + jnp.arange(b)[:, None]
    draft = _stats(flat, draft_rows, real[:, 1:], factor, size)

    def scored(stats: _Stats, chosen: jax.Array) -> jax.Array:
        """Probabilities [B, G] of the drafts, whose logits are `chosen`."""
        most, sums = merged(stats.top, stats.total, jnp.broadcast_to(factor[:, None], stats.top.shape[:2]))
        soft = jnp.exp2((chosen - most) * factor[:, None]) / jnp.maximum(jnp.sum(sums, -1), 1e-30)
        return jnp.where(greedy[:, None], (_first_largest(stats) == tokens).astype(jnp.float32), soft)

    before = _Stats(*(values[:, :g] for values in target))
    of_draft, of_target = scored(draft, flat[draft_rows, tokens]), scored(before, target_logits[rows[:, :g], tokens])
    accepted = accepted_prefix(is_below(accept, acceptance_probabilities(of_draft, of_target)), lengths)

    def at(values: jax.Array, index: jax.Array) -> jax.Array:
        """[B, K, ..] -> [B, ..]."""
        shape = (b, 1, *[1] * (values.ndim - 2))
        return jnp.take_along_axis(values, index.reshape(shape), axis=1)[:, 0]

    ends = _Stats(*(at(values, accepted) for values in target))  # [B, P]
    most, sums = merged(ends.top, ends.total, factor)
    last = jnp.minimum(accepted, g - 1)
    low, parts_of = merged(at(draft.top, last), at(draft.total, last), factor)
    # After all drafts nothing is subtracted: as if no logit of the drafter came near its largest.
    low = jnp.where(accepted < lengths, low, -MASKED)
    pair = [target_logits, at(rows, accepted), most, jnp.sum(sums, axis=-1)]
    pair += [flat, at(draft_rows, last), low, jnp.maximum(jnp.sum(parts_of, axis=-1), 1e-30)]
    surplus = _surplus(pair, factor, size, parts)
    left = jnp.sum(surplus, axis=-1) > FLOOR
    pair[6] = jnp.where(left, low, -MASKED)
    sums = jnp.where(left[:, None], surplus, sums)
    drawn = _pick(pair, sums, following, factor, size)
    return accepted, jnp.where(greedy, at(best, accepted), drawn)


def _first_largest(stats: _Stats) -> jax.Array:
    """Index [..] of the first largest logit."""
    largest = stats.top == jnp.max(stats.top, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, stats.first, FAR), axis=-1)


def _stats(logits: jax.Array, rows: jax.Array, real: jax.Array, factor: jax.Array, size: int) -> _Stats:
    """Stats [B, K, P] of some rows [B, K] of logits [R, V]; of those that are not real, of nothing."""
    (b, k), v = rows.shape, logits.shape[1]
    parts = pl.cdiv(v, size)
    chosen = jnp.where(real, rows, -1).reshape(-1).astype(jnp.int32)
    out = [jax.ShapeDtypeStruct((b * k, parts), kind) for kind in (jnp.float32, jnp.float32, jnp.int32)]
    found = triton.call(
        functools.partial(_stats_kernel, size=size, v=v),
        (logits, chosen, jnp.repeat(factor, k)),
        [pl.BlockSpec(logits.shape, lambda i, j: (0, 0)), one_spec(1), one_spec(1)],
        out,
        [pl.BlockSpec((None, 1), lambda i, j: (j, i))] * 3,
        grid=(parts, b * k),
        warps=4,
        stages=1,
    )
    return _Stats(*(values.reshape(b, k, parts) for values in found))


def _stats_kernel(
    logits_ref: Any, row_ref: Any, factor_ref: Any, top_ref: Any, total_ref: Any, first_ref: Any, *, size: int, v: int
) -> None:
    row, column = row_ref[0], numbers(size, pl.program_id(0) * size)
    there = (column < v) & (row >= 0)
    x = load(logits_ref, (jnp.full((size,), jnp.maximum(row, 0)), column), there, MASKED)
    top = jnp.max(x)
    top_ref[0] = top
    total_ref[0] = jnp.sum(jnp.where(there, jnp.exp2((x - top) * factor_ref[0]), 0.0))
    first_ref[0] = jnp.min(jnp.where((x == top) & there, column, FAR))


def _weights(pair: Any, column: jax.Array, there: jax.Array, factor: Any) -> jax.Array:
    """(q - p)+ [N] of some tokens; `pair` is one or two times references to logits, row, maximum and total."""
    found = []
    for logits_ref, row_ref, most_ref, total_ref in zip(*[iter(pair)] * 4, strict=True):
        row = jnp.full(column.shape, row_ref[0])
        x = load(logits_ref, (row, column), there, MASKED)
        found.append(jnp.exp2((x - most_ref[0]) * factor) / total_ref[0])
    surplus = found[0] if len(found) == 1 else jnp.maximum(found[0] - found[1], 0.0)
    return jnp.where(there, surplus, 0.0)


def _pair_specs(pair: Any, axis: int) -> list[Any]:
    return [pl.BlockSpec(x.shape, lambda *program: (0, 0)) if x.ndim == 2 else one_spec(axis) for x in pair]


def _surplus(pair: Any, factor: jax.Array, size: int, parts: int) -> jax.Array:
    """Sums [B, P] of (q - p)+."""
    b, v = factor.shape[0], pair[0].shape[1]

    def kernel(*refs: Any) -> None:
        *pair_refs, factor_ref, out_ref = refs
        column = numbers(size, pl.program_id(0) * size)
        out_ref[0] = jnp.sum(_weights(pair_refs, column, column < v, factor_ref[0]))

    return triton.call(
        kernel,
        (*pair, factor),
        [*_pair_specs(pair, 1), one_spec(1)],
        jax.ShapeDtypeStruct((b, parts), jnp.float32),
        pl.BlockSpec((None, 1), lambda i, j: (j, i)),
        grid=(parts, b),
        warps=4,
        stages=1,
    )


def _pick(pair: Any, sums: jax.Array, uniforms: jax.Array, factor: jax.Array, size: int) -> jax.Array:
    """Tokens [B] drawn from (q - p)+, of whose parts `sums` [B, P] are the sums."""
    (b, parts), v = sums.shape, pair[0].shape[1]

    def kernel(*refs: Any) -> None:
        *pair_refs, sums_ref, uniform_ref, factor_ref, out_ref = refs
        part = numbers(power_of_two(parts, 1))
        found = draw_part(load(sums_ref, part, part < parts, 0.0), (uniform_ref[0], uniform_ref[1]))
        column = numbers(size, found[0] * size)
        weights = _weights(pair_refs, column, column < v, factor_ref[0])
        # The parts' sums may be of weights that are not normalised; within a part only shares count.
        mass = jnp.maximum(jnp.sum(weights), 1e-30)
        share = jnp.sum(jnp.where(part == found[0], load(sums_ref, part, part < parts, 0.0), 0.0))
        inside = draw_inside(weights * (share / mass), *found[1:])
        out_ref[0] = jnp.minimum(found[0] * size + inside, v - 1)

    return triton.call(
        kernel,
        (*pair, sums, uniforms, factor),
        [
            *_pair_specs(pair, 0),
            pl.BlockSpec((None, parts), lambda i: (i, 0)),
            pl.BlockSpec((None, 2), lambda i: (i, 0)),
            one_spec(0),
        ],
        jax.ShapeDtypeStruct((b,), jnp.int32),
        one_spec(0),
        grid=(b,),
        warps=4,
        stages=1,
    )
