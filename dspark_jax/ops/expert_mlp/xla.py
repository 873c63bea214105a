"""`expert_mlp` by XLA, in a form that depends on shapes alone:

- few pairs of row and expert (T k <= E): their matrices are collected, 3 T k D F values that are read, written, read.
- more: rows are sorted by expert. Where gradients are asked for, or on a TPU, `ragged_dot` goes through them, elsewhere
  a loop over blocks of rows of one expert each. Every expert that is chosen is read once (a block of rows at a time).
"""

import jax
import jax.numpy as jnp

from dspark_jax import platform
from dspark_jax.ops.expert_mlp.parts import Inner, Parts, by_expert
from dspark_jax.ops.product import product

_BLOCK = 64
"""Most rows of one expert that go through a product at a time, where the rows are many."""


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
    """See `api.expert_mlp`."""
    t, k = chosen.shape
    here = (chosen >= 0) & (chosen < parts.count)
    experts = jax.tree.map(lambda part: part.astype(rows.dtype), parts.of_layer(layer))
    if _few(t * k, count):
        out = _collected(rows, jnp.where(here, chosen, 0), experts, inner)
    else:
        through = _ragged if trained or platform.current() == "tpu" else _blocks  # a loop of so many has no gradient
        order, sizes = by_expert(chosen.reshape(-1), parts.count)
        out = through(rows[order // k], sizes, experts, inner)[jnp.argsort(order)].reshape(t, k, -1)
    return jnp.sum(jnp.where(here[..., None], out * weights[..., None], 0), axis=1)  # what is not here may be anything


def _few(pairs: int, count: int) -> bool:
    """Whether to collect the matrices of so many pairs of row and expert."""
    return pairs <= count


def _collected(rows: jax.Array, chosen: jax.Array, experts: Parts, inner: Inner) -> jax.Array:
    """rows [T, D] through the experts chosen [T, k]: [T, k, D]."""

    def products(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jnp.einsum("td,tkdf->tkf" if rows.ndim == 2 else "tkd,tkdf->tkf", rows, matrices)

    return experts.of(chosen).through(products, rows, inner)


def _ragged(rows: jax.Array, sizes: jax.Array, experts: Parts, inner: Inner) -> jax.Array:
    """rows [R, D], sorted by expert, of which expert e has sizes[e]: [R, D]; anything for rows of none."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")  # of rows of none, the last
    biases = {
        name: None if bias is None else jnp.take(bias, expert, axis=0, mode="clip")
        for name, bias in experts._asdict().items()
        if name.endswith("_bias")
    }

    def products(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrices, sizes)

    return experts._replace(**biases).through(products, rows, inner)


def _blocks(rows: jax.Array, sizes: jax.Array, experts: Parts, inner: Inner) -> jax.Array:
    """The same, block after block. A block goes on into the next expert's rows, which that one then overwrites."""
    size = min(_BLOCK, max(8, -(-len(rows) // len(sizes))))
    blocks = -(-sizes // size)
    ends, first_row = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes
    padded = jnp.pad(rows, ((0, size), (0, 0)))

    def step(number: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(ends, number, side="right")
        at = first_row[expert] + (number - ends[expert] + blocks[expert]) * size
        x = jax.lax.dynamic_slice_in_dim(padded, at, size)
        return jax.lax.dynamic_update_slice_in_dim(out, experts.of(expert).through(product, x, inner), at, axis=0)

    return jax.lax.fori_loop(0, ends[-1], step, jnp.zeros_like(padded))[: len(rows)]
