"""`markov_sample` as two Pallas kernels per draft for NVIDIA GPUs; filters are left to XLA.

    step   grid (parts,)   logits = base + W1[previous] W2^T of a contiguous part of the vocabulary, tile by tile, with
                           the maximum, its first index and the sum of exponentials of every request. W2 and the base
                           logits are read once, and the biased logits take the base's place.
    pick   grid (B,)       greedy requests take the first largest logit; the others draw the part, and then the token in
                           it, from the very logits that are returned.

Every other step walks backwards, so that what the second-level cache still holds of W2 is used again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax import platform
from dspark_jax.ops import triton
from dspark_jax.ops.sampling import FAR, GREEDY_BELOW, Sampling
from dspark_jax.ops.triton import MASKED, dot, load, numbers, power_of_two, rows_of, store
from dspark_jax.ops.triton_sampling import draw_inside, draw_part, exponents, merged, one_spec, whole_spec
from dspark_jax.sharding import devices_here

_PARTS = 132
"""Parts of the vocabulary: multiprocessors of an H100."""

_MOST_TOKENS = 2047
"""Of a part (`ops.sampling.draw`); there are more parts where it takes more."""

_MOST_REQUESTS = 256

_SPARE_BYTES = 8 << 10
"""Of shared memory, that are left free."""


class _Case(NamedTuple):
    """What the kernels are specialised to."""

    batch: int
    rows: int  # batch, filled up to a tile
    v: int
    tile: int
    tiles: int
    parts: int
    stages: int


def markov_sample(
    base_logits: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    anchors: jax.Array,
    uniforms: jax.Array,
    sampling: Sampling,
    *,
    parts: int = _PARTS,
    tile: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """See `api.markov_sample`. `parts` and `tile` are for tests."""
    (g, b, v), r = base_logits.shape, w2.shape[1]
    rows = power_of_two(b)
    sizes = [(tile, 3)] if tile else _fitting(rows * r * w1.dtype.itemsize, r * w2.dtype.itemsize, rows)
    tile, stages = sizes[0] if sizes else (32, 1)
    whole = pl.cdiv(v, tile)  # tiles of the vocabulary
    parts = max(min(parts, whole), pl.cdiv(whole, _MOST_TOKENS // tile))
    case = _Case(b, rows, v, tile, pl.cdiv(whole, parts), parts, stages)
    triton.check(
        the_rank_is_no_power_of_two_from_16_to_512=r in (16, 32, 64, 128, 256, 512),
        there_are_filters=not sampling.filtered,
        there_are_too_many_requests=b <= _MOST_REQUESTS,
        requests_and_rank_are_too_many_for_this_card=bool(sizes),
        logits_of_several_devices_are_not_told_apart=devices_here() == 1,
    )
    factor = exponents(sampling.temperature)
    greedy = (sampling.temperature < GREEDY_BELOW).astype(jnp.int32)
    logits, previous, tokens = base_logits.astype(jnp.float32), anchors.astype(jnp.int32), []
    w1 = w1.reshape(v, r)
    for k in range(g):
        logits, *stats = _step(case, k, logits, w1, w2, previous, factor)
        previous = _pick(case, k, stats, logits, uniforms[k], factor, greedy, drawn=not sampling.greedy)
        tokens.append(previous)
    return jnp.stack(tokens), logits


def _fitting(latent: int, column: int, rows: int) -> list[tuple[int, int]]:
    """(tile, stages) for which this card has room, the best first: `latent` bytes of W1's rows, and of W2 `column` for
    each token of a tile, as often as tiles are fetched ahead."""
    room = platform.gpu_shared_memory() - _SPARE_BYTES - latent
    order = [(tile, stages) for tile in (128, 64, 32) for stages in (3, 2) if tile < 128 or rows <= 32]
    # A tile's logits change their order in shared memory; up to half as much again was seen.
    return [(tile, stages) for tile, stages in order if ((stages - 1) * column + 6 * rows) * tile <= room]


def _step(
    case: _Case, k: int, logits: jax.Array, w1: jax.Array, w2: jax.Array, previous: jax.Array, factor: jax.Array
) -> Any:
    """(all logits, those of draft k now biased; maxima, sums and first indices of the parts [B, P])."""
    (b, v), r = (case.batch, case.v), w2.shape[1]
    slab = pl.BlockSpec((None, b, v), lambda i: (k, 0, 0))
    numbers_of = [jax.ShapeDtypeStruct((b, case.parts), kind) for kind in (jnp.float32, jnp.float32, jnp.int32)]
    return triton.call(
        functools.partial(_step_kernel, case=case, backwards=bool(k % 2)),
        (logits, previous, w1, w2, factor),
        [slab, whole_spec(b), whole_spec(v, r), whole_spec(v, r), whole_spec(b)],
        [jax.ShapeDtypeStruct(logits.shape, logits.dtype), *numbers_of],
        [slab, *[whole_spec(b, case.parts)] * 3],
        grid=(case.parts,),
        warps=8,
        stages=case.stages,
        aliases={0: 0},
    )


def _pick(
    case: _Case,
    k: int,
    stats: Any,
    logits: jax.Array,
    uniforms: jax.Array,
    factor: jax.Array,
    greedy: jax.Array,
    *,
    drawn: bool,
) -> jax.Array:
    """Tokens [B] of draft k."""
    row = pl.BlockSpec((None, case.parts), lambda i: (i, 0))
    inputs, specs = [*stats], [row] * 3
    if drawn:
        inputs += [uniforms, factor, greedy, logits]
        specs += [pl.BlockSpec((None, 2), lambda i: (i, 0)), one_spec(0), one_spec(0)]
        specs += [pl.BlockSpec((None, None, case.v), lambda i: (k, i, 0))]
    return triton.call(
        functools.partial(_pick_kernel, case=case),
        inputs,
        specs,
        jax.ShapeDtypeStruct((case.batch,), jnp.int32),
        one_spec(0),
        grid=(case.batch,),
        warps=4,
        stages=1,
    )


def _step_kernel(
    base_ref: Any, previous_ref: Any, w1_ref: Any, w2_ref: Any, factor_ref: Any, out_ref: Any, top_ref: Any,
    total_ref: Any, first_ref: Any, *, case: _Case, backwards: bool,
) -> None:  # fmt: skip
    part = case.parts - 1 - pl.program_id(0) if backwards else pl.program_id(0)
    b = numbers(case.rows)
    real = b < case.batch
    token, factor = load(previous_ref, b, real), load(factor_ref, b, real, 1.0)
    latent = load(w1_ref, rows_of(w1_ref, token), real[:, None], 0.0)

    def start(j: Any) -> Any:
        return (part * case.tiles + (case.tiles - 1 - j if backwards else j)) * case.tile

    def base(j: Any) -> jax.Array:
        column = numbers(case.tile, start(j))
        mask = real[:, None] & ((column >= 0) & (column < case.v))[None, :]
        return load(base_ref, (b[:, None], column[None, :]), mask, 0.0)

    def body(j: Any, carry: Any) -> Any:
        top, total, first, ahead = carry  # the base logits of the next tile are fetched during the product of this one
        column = numbers(case.tile, start(j))
        there = column < case.v
        w2 = load(w2_ref, (pl.ds(start(j), case.tile), slice(None)), there[:, None], 0.0)
        logits = ahead + dot(latent, w2.T)
        ahead = base(j + 1)
        store(out_ref, (b[:, None], column[None, :]), logits, real[:, None] & there[None, :])
        logits = jnp.where(there[None, :], logits, MASKED)
        best = jnp.max(logits, axis=1)
        index = jnp.min(jnp.where(logits == best[:, None], column[None, :], FAR), axis=1)
        better = (best >= top) if backwards else (best > top)  # the first of equals
        new = jnp.maximum(top, best)
        weights = jnp.where(there[None, :], jnp.exp2((logits - new[:, None]) * factor[:, None]), 0.0)
        total = total * jnp.exp2((top - new) * factor) + jnp.sum(weights, axis=1)
        return new, total, jnp.where(better, index, first), ahead

    lowest = jnp.full((case.rows,), MASKED, jnp.float32)
    carry = lowest, jnp.zeros_like(lowest), jnp.full((case.rows,), FAR, jnp.int32), base(0)
    *stats, _ = lax.fori_loop(0, case.tiles, body, carry)
    for ref, values in zip((top_ref, total_ref, first_ref), stats, strict=True):
        store(ref, (b, jnp.full((case.rows,), part, jnp.int32)), values, real)


def _pick_kernel(top_ref: Any, total_ref: Any, first_ref: Any, *refs: Any, case: _Case) -> None:
    *drawing, token_ref = refs
    part = numbers(power_of_two(case.parts, 1))
    there = part < case.parts
    top, first = load(top_ref, part, there, MASKED), load(first_ref, part, there, FAR)
    token = jnp.min(jnp.where(top == jnp.max(top), first, FAR))
    if drawing:
        uniform_ref, factor_ref, greedy_ref, logits_ref = drawing
        factor, size = factor_ref[0], case.tiles * case.tile
        most, sums = merged(top, load(total_ref, part, there, 0.0), factor)
        part, scale, rest, mass = draw_part(sums, (uniform_ref[0], uniform_ref[1]))
        column = numbers(power_of_two(size), part * size)
        inside = (column < (part + 1) * size) & (column < case.v)
        weights = jnp.exp2((load(logits_ref, column, inside, MASKED) - most) * factor)
        drawn = part * size + draw_inside(jnp.where(inside, weights, 0.0), scale, rest, mass)
        token = jnp.where(greedy_ref[0] > 0, token, drawn)
    token_ref[0] = jnp.minimum(token, case.v - 1)  # also where no logit is finite
