"""A mixture of experts in the place of an MLP: a router chooses a few of many gated MLPs for every row.

Experts are split over the mesh's `tensor` axis, each whole on one device, which computes what its own experts give to
all rows that it has (`ops.expert_mlp`); the parts are then added up. They are held split over `fsdp` as well, whole
where there are enough of them, and collected for every layer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax import platform
from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.expert_mlp import Inner, Parts, expert_mlp
from dspark_jax.sharding import Param, parts_of, per_device
from dspark_jax.target.families.family import ExpertShape
from dspark_jax.target.layers import MLP, dense, gated, narrow, normal, stay_stacked, zeros

SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
}
"""What makes scores of the logits of a router, by name."""


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
        self.number: Any = nnx.data(None)  # of the layer whose matrices these are, where they stay in their stack
        self.shape = shape
        self.function = gate
        self.trained = False  # gradients are asked for: a drafter's

    def __call__(self, x: jax.Array, tokens: jax.Array | None = None) -> jax.Array:
        """[..., D] -> [..., D]; `tokens` [...] are the rows' ids, which a hashed router goes by."""
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(rows, None if tokens is None else tokens.reshape(-1))
        count = self.shape.count
        parts = parts_of("collected_experts")
        parts = parts if count % parts == 0 else 1
        whole, bias = ("batch", None), ("collected_experts", None)
        matrix: tuple[str | None, ...] = ("collected_experts", None, None)
        matrix = matrix if self.number is None else (None, *matrix)
        number = jnp.zeros(1, jnp.int32) if self.number is None else self.number[...].reshape(1)
        biases = [b[...] for b in (self.gate_bias, self.up_bias, self.down_bias) if b is not None]
        run = per_device(
            functools.partial(_own_part, count=count, inner=_inner(self.shape, self.function), trained=self.trained),
            inputs=(whole, whole, whole, (None,), matrix, matrix, matrix, *(bias for _ in biases)),
            outputs=(("collected_experts", *whole),),
            shapes=((parts, *rows.shape),),
        )
        (out,) = run(rows, chosen, weights, number, self.gate[...], self.up[...], self.down[...], *biases)
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
        """See `decode_weights`; nothing is joined. Where layers stay in stacks, a kernel reads the matrices there."""
        del join
        self.trained = False
        for weight in (self.router, self.gate, self.up, self.down, self.shared_gate):
            narrow(weight, dtype)
        stacked = self.gate[...].ndim == 4
        if stacked and not platform.unstacks_layers() and parts_of("embed") == 1:
            self.number = Param(jnp.arange(self.gate[...].shape[0], dtype=jnp.int32), axes=("layers",))
            for weight in (self.gate, self.up, self.down):
                stay_stacked(weight)


def _table(rngs: nnx.Rngs, stack: tuple[int, ...], shape: ExpertShape) -> Param:
    """A random table of a hashed router, [*stack, tokens, k] int32."""
    size = (*stack, shape.hashed, shape.chosen)
    first = jax.random.randint(rngs.params(), size[:-1], 0, shape.count)
    value = (first[..., None] + jnp.arange(shape.chosen)) % shape.count  # each expert once
    return Param(value.astype(jnp.int32), axes=("layers",) * len(stack) + ("tokens", "rank"))


def _inner(shape: ExpertShape, gate: str) -> Inner:
    """What is between an expert's matrices."""
    if shape.sharpness is None:
        return functools.partial(gated, function=gate, limit=shape.limit)
    sharpness = shape.sharpness

    def clipped(gates: jax.Array, up: jax.Array) -> jax.Array:
        gates, up = jnp.minimum(gates, shape.limit), jnp.clip(up, -shape.limit, shape.limit)
        return (up + 1) * gates * jax.nn.sigmoid(sharpness * gates)

    return clipped


def _own_part(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    number: jax.Array,
    *parts: jax.Array,
    count: int,
    inner: Inner,
    trained: bool,
) -> tuple[jax.Array]:
    """What the experts of this device, of `count` altogether, give to the rows: [1, T, D]. `number` [1] is the layer's,
    which says something where `parts` are of a stack."""
    experts = Parts(*parts)
    chosen = chosen if experts.count == count else chosen - experts.count * jax.lax.axis_index("tensor")
    layer = number[0] if experts.gate.ndim == 4 else None
    return (expert_mlp(rows, chosen, weights, experts, inner, layer=layer, count=count, trained=trained)[None],)
