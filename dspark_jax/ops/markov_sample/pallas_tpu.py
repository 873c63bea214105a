"""`markov_sample` as one Pallas kernel for TPUs; filters are left to XLA. Compiled for TPUs, and run in interpret mode;
never run on a TPU.

    grid (G, tiles of V)   logits = base + W1[previous] W2^T of a tile, with the maximum, its first index and the sum of
                           exponentials of every request; after the last tile of a draft its tokens are picked: greedy
                           requests take the first largest logit, the others draw the tile, and then the token in it,
                           from the very logits that are returned.

W2 stays on the chip from draft to draft, as many tiles of it as there is room for: Qwen3-4B's has 78 MB, which a v5e or
v6e holds whole. The biased logits take the base's place.
"""

import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dspark_jax import platform
from dspark_jax.ops import mosaic
from dspark_jax.ops.mosaic import LANES, MASKED, dot, numbers
from dspark_jax.ops.mosaic_sampling import draw_inside, draw_part
from dspark_jax.ops.sampling import FAR, GREEDY_BELOW, Sampling
from dspark_jax.sharding import parts_of, per_device

_TILE = 1920
"""Tokens of a tile: whole registers, and fewer than the 2048 that `ops.sampling.draw` can add up."""

_AHEAD = 2
"""Tiles of W2 that are on their way while one is used."""

_MOST_REQUESTS = 256


class Sizes(NamedTuple):
    """Tokens of a tile; tiles of W2 that stay on the chip, at most."""

    tile: int = _TILE
    held: int = 1 << 30


class _Case(NamedTuple):
    """What the kernel is specialised to."""

    g: int
    b: int
    v: int
    tile: int
    tiles: int
    held: int
    memory: int
    drawn: bool

    @classmethod
    def fitting(cls, shape: tuple[int, ...], w2_row: int, sizes: Sizes, *, drawn: bool) -> Self:
        """For base logits of a shape and rows of W2 of so many bytes, on the chip that is compiled for."""
        (g, b, v), tile = shape, min(sizes.tile, shape[2])
        tiles, room = pl.cdiv(v, tile), platform.tpu_kernel_memory()
        buffers = 12 * pl.cdiv(b, 8) * 8 * tile * 4 + (4 << 20)  # two of base and logits each, one to draw from, values
        fit = (room - buffers) // (tile * w2_row)
        held = min(tiles, sizes.held) if fit >= tiles else min(max(fit - _AHEAD - 1, 0), sizes.held)
        case = cls(g, b, v, tile, tiles, held, buffers, drawn)
        return case._replace(memory=buffers + case.slots * tile * w2_row)

    @property
    def slots(self) -> int:
        """Tiles of W2 that there is room for: those that stay, and a ring for the others."""
        return self.held + (_AHEAD + 1 if self.held < self.tiles else 0)

    @property
    def parts(self) -> int:
        """Tiles, filled up to whole registers."""
        return pl.cdiv(self.tiles, LANES) * LANES


def markov_sample(
    base_logits: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    anchors: jax.Array,
    uniforms: jax.Array,
    sampling: Sampling,
    *,
    sizes: Sizes = Sizes(),  # noqa: B008  (immutable)
) -> tuple[jax.Array, jax.Array]:
    """See `api.markov_sample`. Over a mesh, devices split the requests. `sizes` is for tests."""
    (_, b, v), r = base_logits.shape, w2.shape[1]
    ways = parts_of("batch")
    mosaic.check(
        there_are_filters=not sampling.filtered,
        the_rank_is_no_multiple_of_128=r % LANES == 0,
        the_vocabulary_is_no_multiple_of_128=v % LANES == 0,
        the_matrices_are_neither_both_bfloat16_nor_both_float32=w1.dtype == w2.dtype
        and w2.dtype in (jnp.bfloat16, jnp.float32),
        there_are_too_many_requests=b // ways <= _MOST_REQUESTS,
        the_vocabulary_is_split_over_devices=parts_of("vocab") == 1,
        requests_are_not_split_evenly=b % ways == 0,
    )
    greedy = sampling.temperature < GREEDY_BELOW
    factor = 1.0 / jnp.where(greedy, 1.0, sampling.temperature)
    arrays = (
        base_logits.astype(jnp.float32),
        w1.reshape(v, r // LANES, LANES),
        w2,
        anchors.astype(jnp.int32),
        uniforms,
        factor[:, None],
        greedy.astype(jnp.int32)[:, None],
    )
    batch, rows = (None, "batch", None), ("batch", None)
    here = functools.partial(_sample_here, sizes=sizes, drawn=not sampling.greedy)
    inputs = (batch, (None, None, None), (None, None), ("batch",), batch, rows, rows)
    tokens, logits = per_device(here, inputs, ((None, "batch"), batch))(*arrays)
    return tokens, logits


def _sample_here(
    base: jax.Array, w1: jax.Array, w2: jax.Array, anchors: jax.Array, uniforms: jax.Array, factor: jax.Array,
    greedy: jax.Array, *, sizes: Sizes, drawn: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """On one device: base [G, B, V], w1 [V, R/128, 128], factor and greedy [B, 1]."""
    (g, b, v), r = base.shape, w2.shape[1]
    case = _Case.fitting(base.shape, r * w2.dtype.itemsize, sizes, drawn=drawn)
    column = pl.BlockSpec((b, 1), lambda k, j, _: (0, 0))
    everywhere = pl.BlockSpec(memory_space=pl.ANY)
    read = w2.dtype.itemsize * r * (min(case.held * case.tile, v) + max(v - case.held * case.tile, 0) * g)
    logits, tokens = mosaic.call(
        functools.partial(_kernel, case=case),
        [anchors],
        [base, w1, w2, uniforms, factor, greedy],
        [
            pl.BlockSpec((None, b, case.tile), lambda k, j, _: (k, 0, j)),
            everywhere,
            everywhere,
            pl.BlockSpec((None, b, 2), lambda k, j, _: (k, 0, 0)),
            column,
            column,
        ],
        [jax.ShapeDtypeStruct(base.shape, jnp.float32), jax.ShapeDtypeStruct((g, b, 1), jnp.int32)],
        [everywhere, pl.BlockSpec((None, b, 1), lambda k, j, _: (k, 0, 0))],
        grid=(g, case.tiles),
        parallel=0,
        scratch=_scratch(case, w1, w2),
        flops=2 * g * b * v * r,
        exponentials=g * b * v if drawn else 0,
        moved=read + 8 * g * b * v,
        memory=case.memory,
        in_place=(0,),
    )
    return tokens[..., 0], logits


class _Scratch(NamedTuple):
    """What lasts over the grid."""

    w2: Any  # [slots, tile, R]
    latent: Any  # [B, R/128, 128] rows of W1
    logits: Any  # [2, B, tile]
    top: Any  # [B, parts]
    total: Any
    first: Any
    token: Any  # [B, 1] what goes to scalar memory
    scalars: Any  # [B, 1] and there
    chosen: Any  # [B, tile] logits of the tiles that were drawn
    arrived: Any  # semaphores of the slots of W2
    written: Any  # of the two tiles of logits
    small: Any


def _scratch(case: _Case, w1: jax.Array, w2: jax.Array) -> _Scratch:
    b, tile = case.b, case.tile
    return _Scratch(
        pltpu.VMEM((case.slots, tile, w2.shape[1]), w2.dtype),
        pltpu.VMEM((b, *w1.shape[1:]), w1.dtype),
        pltpu.VMEM((2, b, tile), jnp.float32),
        pltpu.VMEM((b, case.parts), jnp.float32),
        pltpu.VMEM((b, case.parts), jnp.float32),
        pltpu.VMEM((b, case.parts), jnp.int32),
        pltpu.VMEM((b, 1), jnp.int32),
        pltpu.SMEM((b, 1), jnp.int32),
        pltpu.VMEM((b, tile), jnp.float32),
        pltpu.SemaphoreType.DMA((case.slots,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA(()),
    )


def _kernel(
    anchors_ref: Any, base_ref: Any, w1_ref: Any, w2_ref: Any, uniforms_ref: Any, factor_ref: Any, greedy_ref: Any,
    logits_out: Any, token_out: Any, *scratch: Any, case: _Case,
) -> None:  # fmt: skip
    """References: anchors in scalar memory; base [B, tile], uniforms [B, 2], factor and greedy [B, 1]; W1, W2 and the
    logits [G, B, V] in HBM; tokens [B, 1]; scratch, see `_Scratch`."""
    s = _Scratch(*scratch)
    k, j = pl.program_id(0), pl.program_id(1)
    turn = k * case.tiles + j

    @pl.when(turn == 0)
    def _() -> None:
        for ahead in range(_AHEAD):
            _fetch(case, s, w2_ref, ahead, lambda copy: copy.start())
        lax.fori_loop(0, case.b, lambda b, _: _set(s.scalars, b, anchors_ref[b]), None)

    @pl.when(j == 0)
    def _() -> None:
        _each(case.b, lambda b: pltpu.make_async_copy(w1_ref.at[s.scalars[b, 0]], s.latent.at[b], s.small))

    _fetch(case, s, w2_ref, turn + _AHEAD, lambda copy: copy.start())
    _fetch(case, s, w2_ref, turn, lambda copy: copy.wait())
    pl.when(j >= 2)(lambda: _write(case, s, logits_out, k, j - 2, lambda copy: copy.wait()))
    _step(case, s, base_ref, factor_ref, k, j)
    _write(case, s, logits_out, k, j, lambda copy: copy.start())

    @pl.when(j == case.tiles - 1)
    def _() -> None:
        for last in range(max(case.tiles - 2, 0), case.tiles):
            _write(case, s, logits_out, k, last, lambda copy: copy.wait())
        token = jnp.clip(_pick(case, s, uniforms_ref, factor_ref, greedy_ref, logits_out.at[k]), 0, case.v - 1)
        token_out[...] = token
        _to_scalars(s, token)


def _set(ref: Any, row: Any, value: Any) -> None:
    ref[row, 0] = value


def _each(count: int, copy: Any) -> None:
    """Starts the copies of rows 0 .. count - 1, and waits for them."""
    lax.fori_loop(0, count, lambda b, _: copy(b).start(), None)
    lax.fori_loop(0, count, lambda b, _: copy(b).wait(), None)


def _to_scalars(s: _Scratch, values: jax.Array) -> None:
    """Brings int32 [B, 1] to scalar memory, from where they can be addresses."""
    s.token[...] = values
    copy = pltpu.make_async_copy(s.token, s.scalars, s.small)
    copy.start()
    copy.wait()


def _pieces(case: _Case, j: Any, act: Any) -> None:
    """Calls act(first token, tokens) for tile j; the last one may be shorter."""
    rest = case.v - (case.tiles - 1) * case.tile
    if rest == case.tile:
        act(pl.multiple_of(j * case.tile, LANES), case.tile)
        return
    pl.when(j < case.tiles - 1)(lambda: act(pl.multiple_of(j * case.tile, LANES), case.tile))
    pl.when(j == case.tiles - 1)(lambda: act(case.v - rest, rest))


def _slot(case: _Case, turn: Any) -> Any:
    """Where the tile of W2 lies that a turn uses."""
    k, j = turn // case.tiles, lax.rem(turn, case.tiles)
    if case.held == case.tiles:
        return j
    streamed = k * (case.tiles - case.held) + j - case.held
    return jnp.where(j < case.held, j, case.held + lax.rem(jnp.maximum(streamed, 0), _AHEAD + 1))


def _fetch(case: _Case, s: _Scratch, w2_ref: Any, turn: Any, act: Any) -> None:
    """Acts on the copy of the tile of W2 that a turn uses, if it is to be fetched for it."""
    k, j, slot = turn // case.tiles, lax.rem(turn, case.tiles), _slot(case, turn)

    def copy(start: Any, size: int) -> None:
        here = s.w2.at[slot, pl.ds(0, size), :]
        act(pltpu.make_async_copy(w2_ref.at[pl.ds(start, size), :], here, s.arrived.at[slot]))

    new = (turn < case.g * case.tiles) & ((k == 0) | (j >= case.held))
    pl.when(new)(lambda: _pieces(case, j, copy))


def _write(case: _Case, s: _Scratch, logits_out: Any, k: Any, j: Any, act: Any) -> None:
    """Acts on the copy of draft k's logits of tile j to HBM."""
    slot = lax.rem(j, 2)

    def copy(start: Any, size: int) -> None:
        there = logits_out.at[k, :, pl.ds(start, size)]
        act(pltpu.make_async_copy(s.logits.at[slot, :, pl.ds(0, size)], there, s.written.at[slot]))

    _pieces(case, j, copy)


def _step(case: _Case, s: _Scratch, base_ref: Any, factor_ref: Any, k: Any, j: Any) -> None:
    """Logits of tile j of draft k, and what is kept of them."""
    slot = _slot(case, k * case.tiles + j)
    logits = base_ref[...]
    for i in range(s.latent.shape[1]):
        lanes = slice(i * LANES, (i + 1) * LANES)
        logits += dot(s.latent[:, i, :], s.w2[slot, :, lanes], transposed=True)
    s.logits[lax.rem(j, 2)] = logits

    column = j * case.tile + numbers(logits.shape, 1)
    there = column < case.v
    logits = jnp.where(there, logits, MASKED)
    top = jnp.maximum(jnp.max(logits, axis=1, keepdims=True), MASKED)  # finite, also where all logits are -inf
    first = jnp.min(jnp.where(logits == top, column, FAR), axis=1, keepdims=True)
    here = numbers(s.top.shape, 1) == j
    s.top[...] = jnp.where(here, top, s.top[...])
    s.first[...] = jnp.where(here, first, s.first[...])
    if case.drawn:
        weights = jnp.where(there, jnp.exp((logits - top) * factor_ref[...]), 0.0)
        s.total[...] = jnp.where(here, jnp.sum(weights, axis=1, keepdims=True), s.total[...])


def _pick(case: _Case, s: _Scratch, uniforms_ref: Any, factor_ref: Any, greedy_ref: Any, logits_ref: Any) -> jax.Array:
    """Tokens [B, 1] of a draft whose logits [B, V] are in HBM."""
    real = numbers(s.top.shape, 1) < case.tiles
    top = jnp.where(real, s.top[...], MASKED)
    most = jnp.max(top, axis=1, keepdims=True)
    best = jnp.min(jnp.where(real & (top == most), s.first[...], FAR), axis=1, keepdims=True)
    if not case.drawn:
        return best
    factor = factor_ref[...]
    sums = jnp.where(real, s.total[...] * jnp.exp((top - most) * factor), 0.0)
    part, scale, rest, mass = draw_part(sums, uniforms_ref[...])
    wanted = jnp.clip(part, 0, case.tiles - 1) * case.tile
    begin = jnp.minimum(wanted, case.v - case.tile)  # the last tile may be shorter
    _to_scalars(s, begin)

    def fetch(b: Any) -> Any:
        there = logits_ref.at[pl.ds(b, 1), pl.ds(pl.multiple_of(s.scalars[b, 0], LANES), case.tile)]
        return pltpu.make_async_copy(there, s.chosen.at[pl.ds(b, 1), :], s.small)

    _each(case.b, fetch)
    inside = begin + numbers(s.chosen.shape, 1) >= wanted
    weights = jnp.where(inside, jnp.exp((s.chosen[...] - most) * factor), 0.0)
    return jnp.where(greedy_ref[...] > 0, best, begin + draw_inside(weights, scale, rest, mass))
