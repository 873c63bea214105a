"""`expert_mlp` as two Pallas kernels for NVIDIA GPUs, which go through tiles of rows of one expert each, and read what
is chosen only. Compiled for an H100, and run in interpret mode; never run on a GPU.

    inward     grid (tiles, columns of F)    inner(rows [M, D] @ gate, rows @ up) -> [M, F]
    outward    grid (tiles, columns of D)    [M, F] @ down -> [M, D]
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax.ops import triton
from dspark_jax.ops.expert_mlp.parts import Inner, Parts, Tiles, tile_rows
from dspark_jax.ops.triton import dot, load, numbers, store
from dspark_jax.ops.triton_sampling import whole_spec

_FEWEST_ROWS, _MOST_ROWS = 16, 128
"""Of a tile; a tensor core takes sixteen."""

_COLUMNS, _DEPTH = 64, 64
"""Of a matrix: columns of a program, and rows of a turn of its loop."""


class _Case(NamedTuple):
    """What the kernels are specialised to: rows of a tile, and sizes of the experts' matrices."""

    m: int
    d: int
    f: int
    inner: Inner


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
) -> jax.Array:
    """See `api.expert_mlp`; it runs on one device's own experts. A layer of a stack is copied out of it."""
    (t, d), k, e, f = rows.shape, chosen.shape[1], parts.count, parts.gate.shape[-1]
    triton.check(
        it_has_no_gradients=not trained,
        the_type_is_neither_bfloat16_nor_float32=rows.dtype in (jnp.bfloat16, jnp.float32),
        the_matrices_are_of_another_type=all(part.dtype == rows.dtype for part in parts[:3]),
        a_matrix_of_all_experts_is_too_large=e * d * f < 1 << 31,
        some_biases_are_missing=len({part is None for part in parts[3:]}) == 1,
    )
    case = _Case(tile_rows(t * k, count, _FEWEST_ROWS, _MOST_ROWS), d, f, inner)
    tiles, own = Tiles.of(chosen, e, case.m), parts.of_layer(layer)
    gates, ups = (matrix.reshape(e * d, f) for matrix in (own.gate, own.up))
    biases = [bias for bias in own[3:] if bias is not None]
    between = _run(_inward, case, tiles, [rows[tiles.source], gates, ups, *biases[:2]], f)
    return tiles.summed(_run(_outward, case, tiles, [between, own.down.reshape(e * f, d), *biases[2:]], d), weights)


def _run(kernel: Any, case: _Case, tiles: Tiles, inputs: list[jax.Array], width: int) -> jax.Array:
    """A kernel over tiles and `_COLUMNS` of the output at a time: [N M, width]."""
    count, kind = len(tiles.source), inputs[0].dtype
    given = [tiles.active, tiles.expert, *inputs]
    return triton.call(
        functools.partial(kernel, case=case),
        given,
        [whole_spec(*x.shape) for x in given],
        jax.ShapeDtypeStruct((count, width), kind),
        whole_spec(count, width),
        grid=(len(tiles.expert), pl.cdiv(width, _COLUMNS)),
        warps=4,
        stages=3,
    )


def _inward(active: Any, expert: Any, x: Any, gate: Any, up: Any, *others: Any, case: _Case) -> None:
    """Some columns of what is between the matrices of a tile's expert; `others` are its biases, and the output."""
    *biases, out = others
    tile, rows, columns, real = _place(case.m, case.f)

    @pl.when(tile < active[0])
    def _() -> None:
        own = expert[tile]

        def add(turn: Any, sums: Any) -> Any:
            depth = turn * _DEPTH + numbers(_DEPTH)
            left = load(x, (rows[:, None], depth[None, :]), (depth < case.d)[None, :] & (rows >= 0)[:, None])
            at, there = ((own * case.d + depth)[:, None], columns[None, :]), (depth < case.d)[:, None] & real[None, :]
            return sums[0] + dot(left, load(gate, at, there)), sums[1] + dot(left, load(up, at, there))

        zeros = jnp.zeros((case.m, _COLUMNS), jnp.float32)
        gates, ups = lax.fori_loop(0, pl.cdiv(case.d, _DEPTH), add, (zeros, zeros))
        if biases:
            gates, ups = (
                sums + load(bias, (jnp.full_like(columns, own), columns), real).astype(jnp.float32)[None, :]
                for sums, bias in zip((gates, ups), biases, strict=True)
            )
        store(out, (rows[:, None], columns[None, :]), case.inner(gates, ups), (rows >= 0)[:, None] & real[None, :])


def _outward(active: Any, expert: Any, x: Any, down: Any, *others: Any, case: _Case) -> None:
    """Some columns of what a tile's expert gives."""
    *biases, out = others
    tile, rows, columns, real = _place(case.m, case.d)

    @pl.when(tile < active[0])
    def _() -> None:
        own = expert[tile]

        def add(turn: Any, total: Any) -> Any:
            depth = turn * _DEPTH + numbers(_DEPTH)
            left = load(x, (rows[:, None], depth[None, :]), (depth < case.f)[None, :] & (rows >= 0)[:, None])
            at, there = ((own * case.f + depth)[:, None], columns[None, :]), (depth < case.f)[:, None] & real[None, :]
            return total + dot(left, load(down, at, there))

        total = lax.fori_loop(0, pl.cdiv(case.f, _DEPTH), add, jnp.zeros((case.m, _COLUMNS), jnp.float32))
        if biases:
            total += load(biases[0], (jnp.full_like(columns, own), columns), real).astype(jnp.float32)[None, :]
        store(out, (rows[:, None], columns[None, :]), total, (rows >= 0)[:, None] & real[None, :])


def _place(m: int, width: int) -> tuple[Any, Any, Any, Any]:
    """(tile, its rows [M], columns of the output, which of these there are) of this program."""
    tile, part = pl.program_id(0), pl.program_id(1)
    columns = part * _COLUMNS + numbers(_COLUMNS)
    return tile, tile * m + numbers(m), columns, columns < width
