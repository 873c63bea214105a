"""A mixture of experts in the place of an MLP: a router chooses a few of many gated MLPs for every row.

Experts are split over the mesh's `tensor` axis, each whole on one device, which computes what its own experts give to
all rows that it has; the parts are then added up. Of T rows, D wide, each goes through k of E experts, F wide: that is
6 T k D F operations. In which form depends on shapes alone:

- few pairs of row and expert (T k <= E): their matrices are collected, 3 T k D F values that are read, written, read.
- more: rows are sorted by expert. On a TPU `ragged_dot` goes through them, elsewhere a loop over blocks of rows of one
  expert each. Every expert that is chosen is read once (a block of rows at a time), the others never.

None of them has been timed on an accelerator.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax import platform
from dspark_jax.config import TargetArchitecture
from dspark_jax.sharding import Param, parts_of, per_device
from dspark_jax.target.families.family import ExpertShape
from dspark_jax.target.layers import MLP, dense, gated, narrow, normal, zeros

SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
}
"""What makes scores of the logits of a router, by name."""

_BLOCK = 64
"""Most rows of one expert that go through a product at a time, where the rows are many."""


class Experts(nnx.Module):
    """The experts of a layer and their router; a stack of them by a leading axis on every parameter."""

    def __init__(
        self,
        arch: TargetArchitecture,
        shape: ExpertShape,
        *,
        stack: tuple[int, ...],
        scale: float,
        rngs: nnx.Rngs,
        gate: str = "silu",
    ):
        d, e, f = arch.hidden_size, shape.count, shape.width
        self.router: Any = normal(rngs, stack, (d, e), ("embed", "routes"), scale)
        self.gate: Any = normal(rngs, stack, (e, d, f), ("experts", "embed", "expert_width"), scale)
        self.up: Any = normal(rngs, stack, (e, d, f), ("experts", "embed", "expert_width"), scale)
        self.down: Any = normal(rngs, stack, (e, f, d), ("experts", "expert_width", "embed"), scale)
        biases = shape.biases
        self.router_bias: Any = zeros(stack, (e,), ("routes",)) if biases else None
        self.gate_bias: Any = zeros(stack, (e, f), ("experts", "expert_width")) if biases else None
        self.up_bias: Any = zeros(stack, (e, f), ("experts", "expert_width")) if biases else None
        self.down_bias: Any = zeros(stack, (e, d), ("experts", "embed")) if biases else None
        self.correction: Any = zeros(stack, (e,), ("routes",)) if shape.corrected else None
        self.table: Any = _table(rngs, stack, shape) if shape.hashed else None
        how = {"stack": stack, "scale": scale, "rngs": rngs, "gate": gate}
        self.shared: Any = MLP(arch, width=shape.shared, limit=shape.limit, **how) if shape.shared else None
        self.shared_gate: Any = normal(rngs, stack, (d, 1), ("embed", "routes"), scale) if shape.shared_gated else None
        self.shape = shape
        self.function = gate
        self.trained = False  # gradients are asked for: a drafter's

    def __call__(self, x: jax.Array, tokens: jax.Array | None = None) -> jax.Array:
        """[..., D] -> [..., D]; `tokens` [...] are the rows' ids, which a hashed router goes by."""
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(rows, None if tokens is None else tokens.reshape(-1))
        count = self.shape.count
        parts = parts_of("experts") if count % parts_of("experts") == 0 else 1
        whole, matrix, bias = ("batch", None), ("experts", None, None), ("experts", None)
        biases = [b[...] for b in (self.gate_bias, self.up_bias, self.down_bias) if b is not None]
        run = per_device(
            functools.partial(_own_part, count=count, inner=_inner(self.shape, self.function), trained=self.trained),
            inputs=(whole, whole, whole, matrix, matrix, matrix, *(bias for _ in biases)),
            outputs=(("experts", *whole),),
            shapes=((parts, *rows.shape),),
        )
        (out,) = run(rows, chosen, weights, self.gate[...], self.up[...], self.down[...], *biases)
        routed = jnp.sum(out, axis=0).reshape(x.shape)
        if self.shared is None:
            return routed
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = jax.nn.sigmoid(dense(x, self.shared_gate[...])) * shared
        return routed + shared

    def route(self, rows: jax.Array, tokens: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """rows [T, D], their tokens [T] -> k experts of each and their weights, [T, k].

        The likeliest expert is first (of equal ones the first); in a hashed router the order is the table's.
        """
        logits = dense(rows, self.router[...]).astype(jnp.float32)
        logits = logits if self.router_bias is None else logits + self.router_bias[...].astype(jnp.float32)
        shares = SCORES[self.shape.scores](logits)
        if self.table is not None:
            assert tokens is not None, "a hashed router goes by tokens"
            chosen = self.table[...][tokens]
        else:
            ranks = shares if self.correction is None else shares + self.correction[...].astype(jnp.float32)
            chosen = jax.lax.top_k(ranks, self.shape.chosen)[1]
        weights = jnp.take_along_axis(shares, chosen, axis=-1)
        if self.shape.normalised:
            weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-20)  # scores may all be 0
        return chosen, (weights * self.shape.factor).astype(rows.dtype)

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `decode_weights`; nothing is joined."""
        del join
        self.trained = False
        for weight in (self.router, self.gate, self.up, self.down, self.shared_gate):
            narrow(weight, dtype)


def _table(rngs: nnx.Rngs, stack: tuple[int, ...], shape: ExpertShape) -> Param:
    """A random table of a hashed router, [*stack, tokens, k] int32."""
    size = (*stack, shape.hashed, shape.chosen)
    first = jax.random.randint(rngs.params(), size[:-1], 0, shape.count)
    value = (first[..., None] + jnp.arange(shape.chosen)) % shape.count  # each expert once
    return Param(value.astype(jnp.int32), axes=("layers",) * len(stack) + ("tokens", "rank"))


Inner = Callable[[jax.Array, jax.Array], jax.Array]  # (gate, up) [..., F] -> what goes down


def _inner(shape: ExpertShape, gate: str) -> Inner:
    """What is between an expert's matrices."""
    if shape.sharpness is None:
        return functools.partial(gated, function=gate, limit=shape.limit)
    sharpness = shape.sharpness

    def clipped(gates: jax.Array, up: jax.Array) -> jax.Array:
        gates, up = jnp.minimum(gates, shape.limit), jnp.clip(up, -shape.limit, shape.limit)
        return (up + 1) * gates * jax.nn.sigmoid(sharpness * gates)

    return clipped


class Parts(NamedTuple):
    """What experts are made of; biases are None where there are none.

    Attributes:
      gate: [E, D, F].
      up: [E, D, F].
      down: [E, F, D].
      gate_bias: [E, F].
      up_bias: [E, F].
      down_bias: [E, D].
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None

    def of(self, expert: jax.Array) -> "Parts":
        """Those of one expert, or of several."""
        return jax.tree.map(lambda part: part[expert], self)

    def through(self, product: Callable[..., jax.Array], rows: jax.Array, inner: Inner) -> jax.Array:
        """What the rows become; `product` multiplies rows with matrices, and the biases are one for each row."""
        gates, up = product(rows, self.gate), product(rows, self.up)
        if self.gate_bias is not None and self.up_bias is not None:
            gates, up = gates + self.gate_bias, up + self.up_bias
        out = product(inner(gates, up), self.down)
        return out if self.down_bias is None else out + self.down_bias


def _own_part(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    *parts: jax.Array,
    count: int,
    inner: Inner,
    trained: bool = False,
) -> tuple[jax.Array]:
    """What the experts of this device, of `count` altogether, give to the rows: [1, T, D]."""
    own, (t, k) = len(parts[0]), chosen.shape
    chosen = chosen if own == count else chosen - own * jax.lax.axis_index("tensor")
    here = (chosen >= 0) & (chosen < own)
    experts = Parts(*(part.astype(rows.dtype) for part in parts))
    if _few(t * k, count):
        out = _collected(rows, jnp.where(here, chosen, 0), experts, inner)
    else:
        through = _ragged if trained or platform.current() == "tpu" else _blocks  # a loop of so many has no gradient
        expert = jnp.where(here, chosen, own).reshape(-1)
        out = _sorted(rows, expert, k, experts, inner, through).reshape(t, k, -1)
    out = jnp.where(here[..., None], out * weights[..., None], 0)  # what is not here may be anything
    return (jnp.sum(out, axis=1)[None],)


def _few(pairs: int, count: int) -> bool:
    """Whether to collect the matrices of so many pairs of row and expert."""
    return pairs <= count


def _collected(rows: jax.Array, chosen: jax.Array, experts: Parts, inner: Inner) -> jax.Array:
    """rows [T, D] through the experts chosen [T, k]: [T, k, D]."""

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jnp.einsum("td,tkdf->tkf" if rows.ndim == 2 else "tkd,tkdf->tkf", rows, matrices)

    return experts.of(chosen).through(product, rows, inner)


def _sorted(
    rows: jax.Array, expert: jax.Array, k: int, experts: Parts, inner: Inner, through: Callable[..., jax.Array]
) -> jax.Array:
    """rows [T, D] through the experts [T k] of their pairs, row after row: [T k, D]; anything for an expert E."""
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=len(experts.gate) + 1)[:-1].astype(jnp.int32)
    out = through(rows[order // k], sizes, experts, inner)
    return out[jnp.argsort(order)]


def _ragged(rows: jax.Array, sizes: jax.Array, experts: Parts, inner: Inner) -> jax.Array:
    """rows [R, D], sorted by expert, of which expert e has sizes[e]: [R, D]."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")  # of rows of none, the last
    biases = {
        name: None if bias is None else jnp.take(bias, expert, axis=0, mode="clip")
        for name, bias in experts._asdict().items()
        if name.endswith("_bias")
    }
    return experts._replace(**biases).through(
        lambda rows, matrices: jax.lax.ragged_dot(rows, matrices, sizes), rows, inner
    )


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
        return jax.lax.dynamic_update_slice_in_dim(out, experts.of(expert).through(dense, x, inner), at, axis=0)

    return jax.lax.fori_loop(0, ends[-1], step, jnp.zeros_like(padded))[: len(rows)]
