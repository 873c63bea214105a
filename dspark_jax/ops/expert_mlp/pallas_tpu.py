"""`expert_mlp` as one Pallas kernel for TPUs: the matrices of every chosen expert are read where they are, in a stack
of layers too, and what is between them never leaves the chip. Compiled for TPUs, and run in interpret mode; never run
on a TPU.

Pairs of row and expert are laid out expert after expert, each expert's filled up to whole tiles of rows; XLA collects
the rows so, and a table says whose tile each is. A turn takes a tile of rows through some columns of its expert. Where
all columns fit on the chip, an expert is read once however many tiles it has: the next tile finds it there.

    grid (tiles, columns of F)    tile [M, D] -> [M, D]
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dspark_jax import platform
from dspark_jax.ops import mosaic
from dspark_jax.ops.expert_mlp.parts import Inner, Parts, Tiles, tile_rows
from dspark_jax.ops.mosaic import LANES, dot, numbers

_FEWEST_ROWS, _MOST_ROWS = 16, 512
"""Of a tile. Bfloat16 has 16 rows to a register; with 512, products take longer than reading their matrices."""


class _Case(NamedTuple):
    """What the kernel is specialised to: rows `m` and columns `n` of a turn, of `f` columns."""

    m: int
    n: int
    f: int
    inner: Inner
    biases: bool

    @property
    def turns(self) -> int:
        """Of a tile."""
        return pl.cdiv(self.f, self.n)


def expert_mlp(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    parts: Parts,
    inner: Inner,
    *,
    layer: jax.Array | int | None,
    count: int,
    trained: bool,
    columns: int = 0,
) -> jax.Array:
    """See `api.expert_mlp`; it runs on one device's own experts.

    `columns` of a turn is for tests, a multiple of 128; 0 = what fits.
    """
    (t, d), k, e, f = rows.shape, chosen.shape[1], parts.count, parts.gate.shape[-1]
    biases = parts.gate_bias is not None
    mosaic.check(
        it_has_no_gradients=not trained,
        the_type_is_neither_bfloat16_nor_float32=rows.dtype in (jnp.bfloat16, jnp.float32),
        the_matrices_are_of_another_type=all(part.dtype == rows.dtype for part in parts[:3]),
        some_biases_are_missing=all((part is not None) == biases for part in parts[3:]),
    )
    m = tile_rows(t * k, count, _FEWEST_ROWS, _MOST_ROWS)
    case = _Case(m, columns or _columns(m, d, f, rows.dtype.itemsize), f, inner, biases)
    tiles = Tiles.of(chosen, e, m)
    number = jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)
    if layer is None:
        parts = parts._replace(gate=parts.gate[None], up=parts.up[None], down=parts.down[None])
    return tiles.summed(_through(rows[tiles.source], number, tiles, parts, case, t * k * e // count), weights)


def _columns(m: int, d: int, f: int, size: int) -> int:
    """Columns of a turn: all, or so many that everything fits on the chip."""
    memory = platform.tpu_kernel_memory()
    for turns in range(1, pl.cdiv(f, LANES) + 1):
        n = f if turns == 1 else pl.cdiv(pl.cdiv(f, turns), LANES) * LANES
        rows, between = m * d * (4 * size + 4), 4 * m * n * 4
        if 2 * 3 * d * n * size + rows + between < memory * 3 // 4:
            return n
    mosaic.check(the_rows_are_too_wide=False)
    raise AssertionError


def _through(rows: jax.Array, layer: jax.Array, tiles: Tiles, parts: Parts, case: _Case, pairs: int) -> jax.Array:
    """Tiles of rows [N M, D] through their experts; of tiles that are not active comes anything.

    `pairs` is how many rows are expected to be real ones: what it costs.
    """
    d, e = rows.shape[-1], parts.count

    def column(i: Any, j: Any, active: Any) -> Any:  # of a tile that is not active what is there already
        return jnp.where(i < active[0], j, case.turns - 1)

    def matrix(shape: tuple[int, ...], at: Callable[[Any], tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, *shape), lambda i, j, layer, active, expert: (layer[0], expert[i], *at(column(i, j, active)))
        )

    def bias(width: int, *, whole: bool) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, 1, width),
            lambda i, j, layer, active, expert: (expert[i], 0, 0 if whole else column(i, j, active)),
        )

    inputs = [rows, *parts[:3]]
    specs = [
        pl.BlockSpec(
            (case.m, d), lambda i, j, layer, active, expert: (jnp.clip(i, 0, jnp.maximum(active[0] - 1, 0)), 0)
        ),
        matrix((d, case.n), lambda j: (0, j)),
        matrix((d, case.n), lambda j: (0, j)),
        matrix((case.n, d), lambda j: (j, 0)),
    ]
    if case.biases:
        inputs += [part[:, None] for part in parts[3:] if part is not None]
        specs += [bias(case.n, whole=False), bias(case.n, whole=False), bias(d, whole=True)]
    read = min(e, pairs)
    if case.turns > 1:  # by every tile, of which each expert leaves half a one empty
        read = max(read, pairs // case.m + read // 2)
    return mosaic.call(
        functools.partial(_kernel, case=case),
        [layer, tiles.active, tiles.expert],
        inputs,
        specs,
        jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        pl.BlockSpec((case.m, d), lambda i, j, *tables: (i, 0)),
        grid=(len(tiles.expert), case.turns),
        parallel=1,
        scratch=[pltpu.VMEM((case.m, d), jnp.float32)],
        flops=6 * pairs * d * case.f,
        exponentials=pairs * case.f,
        moved=2 * rows.nbytes + read * 3 * d * case.f * rows.dtype.itemsize,
        memory=platform.tpu_kernel_memory(),
    )


def _kernel(
    layer: Any, active: Any, expert: Any, x: Any, gate: Any, up: Any, down: Any, *others: Any, case: _Case
) -> None:
    """A tile through some columns of its expert; `others` are the biases, the output, and what is added up."""
    del layer, expert
    *biases, out, total = others
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(i < active[0])
    def _() -> None:
        gates, ups, last = dot(x[...], gate[...]), dot(x[...], up[...]), down[...]
        if case.biases:
            gates, ups = gates + biases[0][...].astype(jnp.float32), ups + biases[1][...].astype(jnp.float32)
        between = case.inner(gates, ups)
        if case.f % case.n:  # the last columns may be anything
            left = case.f - j * case.n
            between = jnp.where(numbers(between.shape, 1) < left, between, 0)
            last = jnp.where(numbers(last.shape, 0) < left, last, 0)
        added = dot(between.astype(x.dtype), last)
        start = biases[2][...].astype(jnp.float32) if case.biases else 0.0
        total[...] = jnp.where(j == 0, start, total[...]) + added

        @pl.when(j == case.turns - 1)
        def _() -> None:
            out[...] = total[...].astype(out.dtype)
