"""Transformer pieces shared by every target and drafter: norm, RoPE, attention projections, MLP, layer stacks.

Parameters of a stack of layers carry one leading axis L, so that one compiled body serves all of them. What the
families of models differ in is stated in `attention_shape`, `Layer` and `MLP`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.product import product
from dspark_jax.sharding import Param, gather

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers: all earlier rows are visible, or a window of them. Layers of drafters are full."""


def normal(
    rngs: nnx.Rngs, stack: tuple[int, ...], shape: tuple[int, ...], axes: tuple[str, ...], scale: float
) -> Param:
    """A normally distributed float32 parameter [*stack, *shape]."""
    value = scale * jax.random.normal(rngs.params(), stack + shape, jnp.float32)
    return Param(value, axes=("layers",) * len(stack) + axes)


def ones(stack: tuple[int, ...], size: int, axis: str = "norm") -> Param:
    """A parameter of ones [*stack, size]: the weight of an RMS norm."""
    return Param(jnp.ones((*stack, size), jnp.float32), axes=("layers",) * len(stack) + (axis,))


def narrow(weight: Param | None, dtype: Any) -> None:
    """Holds a matrix as `dtype` from now on. (Setting `weight[...]` would convert it back to the type it had.)"""
    if weight is not None and weight[...].dtype != dtype:
        weight.set_value(weight[...].astype(dtype))


def dense(x: jax.Array, weight: jax.Array, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` axes of x with the first ones of weight, as one 2-D product (CPU's fast path).

    See `ops.product`; the result has x's type, its leading axes, and then the weight's remaining ones.
    """
    lead, width = x.shape[: x.ndim - inputs], math.prod(weight.shape[:inputs])
    return product(x.reshape(-1, width), weight.reshape(width, -1)).reshape(lead + weight.shape[inputs:])


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """x / rms(x) * weight (if any) over the last axis, computed in float32, returned in x's type."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 if weight is None else x32 * weight.astype(jnp.float32)).astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, theta: float, share: float = 1.0) -> jax.Array:
    """Rotary embedding of x [..., T, N, H] at positions [..., T]; halves are rotated, phases are float32.

    Where `share` is below 1, only that share of the pairs turns, at the frequencies that they have among all of them
    (Gemma 4's "proportional" RoPE, trap 21).
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if share < 1.0:
        frequency = jnp.where(jnp.arange(half) < int(share * half), frequency, 0.0)
    phase = positions.astype(jnp.float32)[..., None, None] * frequency
    sin, cos = jnp.sin(phase), jnp.cos(phase)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What the attention of one kind of layer is like.

    Attributes:
      heads: N query heads.
      kv_heads: K key and value heads.
      width: H of each.
      theta: base of the rotary frequencies.
      rotated: share of the pairs that are rotated.
      scale: factor of the scores.
      window: rows that a query sees, its own included; 0 = all before it.
      value_is_key: values are the raw key projections (before their norm and rotation).
      value_norm: values pass an RMS norm without weight.
    """

    heads: int
    kv_heads: int
    width: int
    theta: float
    rotated: float
    scale: float
    window: int
    value_is_key: bool
    value_norm: bool


def attention_shape(arch: TargetArchitecture, kind: str = FULL) -> AttentionShape:
    """The attention of a model's layers of one kind (trap 21 for Gemma 4)."""
    heads, kv_heads, width = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
    if arch.model_type != "gemma4":
        return AttentionShape(heads, kv_heads, width, arch.rope_theta, 1.0, width**-0.5, 0, False, False)
    if kind == SLIDING:
        theta = arch.sliding_rope_theta
        return AttentionShape(heads, kv_heads, width, theta, 1.0, 1.0, arch.sliding_window, False, True)
    kv_heads, width = arch.num_global_key_value_heads, arch.global_head_dim
    rotated, shared = arch.partial_rotary_factor, arch.attention_k_eq_v
    return AttentionShape(heads, kv_heads, width, arch.rope_theta, rotated, 1.0, 0, shared, True)


class Attention(nnx.Module):
    """Projections of grouped-query attention with per-head RMS norms on queries and keys."""

    def __init__(
        self, arch: TargetArchitecture, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs, kind: str = FULL
    ):
        self.shape = attention_shape(arch, kind)
        d, n, k, h = arch.hidden_size, self.shape.heads, self.shape.kv_heads, self.shape.width
        self.query: Any = normal(rngs, stack, (d, n, h), ("embed", "heads", "head_width"), scale)
        self.key: Any = normal(rngs, stack, (d, k, h), ("embed", "kv_heads", "head_width"), scale)
        own = not self.shape.value_is_key
        value = normal(rngs, stack, (d, k, h), ("embed", "kv_heads", "head_width"), scale) if own else None
        self.value: Any = value
        self.out = normal(rngs, stack, (n, h, d), ("heads", "head_width", "embed"), scale)
        self.query_norm: Any = ones(stack, h)
        self.key_norm: Any = ones(stack, h)
        self.eps = arch.rms_norm_eps
        self.reads_context = False  # keys and values are asked for alone as well: a drafter's

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [B, T, D], positions [B, T] -> normed and rotated queries [B, T, N, H]."""
        return self._turn(dense(x, self.query[...]), self.query_norm[...], positions)

    def keys_values(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D], positions [B, T] -> normed and rotated keys, and values, both [B, T, K, H]."""
        key = dense(x, self.key[...])
        value = key if self.value is None else dense(x, self.value[...])
        return self._turn(key, self.key_norm[...], positions), self._values(value)

    def all(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`queries` and `keys_values` of the same rows; in one product after `fuse_weights`."""
        if getattr(self, "joint", None) is None:
            return self.queries(x, positions), *self.keys_values(x, positions)
        n, k = self.shape.heads, self.shape.kv_heads
        heads = dense(x, self.joint[...])
        turned = self._turn(heads[..., : n + k, :], self.joint_norm[...], positions)
        return turned[..., :n, :], turned[..., n:, :], self._values(heads[..., -k:, :])

    def _turn(self, heads: jax.Array, norm: jax.Array, positions: jax.Array) -> jax.Array:
        return rope(rms_norm(heads, norm, self.eps), positions, self.shape.theta, self.shape.rotated)

    def _values(self, value: jax.Array) -> jax.Array:
        return rms_norm(value, None, self.eps) if self.shape.value_norm else value

    def fuse_weights(self, dtype: Any) -> None:
        """See `decode_weights`; for a single layer."""
        for weight in (self.query, self.key, self.value, self.out):
            narrow(weight, dtype)
        query, key = self.query[...], self.key[...]
        parts = [query, key] if self.value is None else [query, key, self.value[...]]
        self.joint = Param(jnp.concatenate(parts, axis=1), axes=(None,) * 3)
        norms = [jnp.broadcast_to(norm[...], (part.shape[1], part.shape[2])) for norm, part in
                 ((self.query_norm, query), (self.key_norm, key))]  # fmt: skip
        self.joint_norm = Param(jnp.concatenate(norms), axes=(None,) * 2)
        # Nothing is kept twice but what a drafter reads of a context alone.
        self.query = self.query_norm = None
        if not self.reads_context:
            self.key = self.key_norm = self.value = None

    def output(self, x: jax.Array) -> jax.Array:
        """Heads [B, T, N, H] -> [B, T, D]."""
        return dense(x, self.out[...], inputs=2)


class MLP(nnx.Module):
    """Gated feed-forward layer: SiLU, or Gemma's GELU (the tanh approximation)."""

    def __init__(self, arch: TargetArchitecture, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs):
        d, f = arch.hidden_size, arch.intermediate_size
        self.gate: Any = normal(rngs, stack, (d, f), ("embed", "mlp"), scale)
        self.up: Any = normal(rngs, stack, (d, f), ("embed", "mlp"), scale)
        self.down = normal(rngs, stack, (f, d), ("mlp", "embed"), scale)
        self.gelu = arch.model_type == "gemma4"

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        if getattr(self, "joint", None) is None:
            gate, up = dense(x, self.gate[...]), dense(x, self.up[...])
        else:
            gate, up = jnp.split(dense(x, self.joint[...]), 2, axis=-1)
        gate = jax.nn.gelu(gate, approximate=True) if self.gelu else jax.nn.silu(gate)
        return dense(gate * up, self.down[...])

    def fuse_weights(self, dtype: Any) -> None:
        """See `decode_weights`; for a single layer."""
        joint = jnp.concatenate([self.gate[...].astype(dtype), self.up[...].astype(dtype)], axis=1)
        self.joint, self.gate, self.up = Param(joint, axes=(None,) * 2), None, None
        narrow(self.down, dtype)


class Layer(nnx.Module):
    """Pre-norm transformer layer (or a stack of them, by a leading axis on every parameter).

    Gemma 4 norms what attention and MLP give once more before it is added, and multiplies the layer's output with a
    stored scalar (trap 21), which is 1 in drafters and no parameter there.
    """

    def __init__(
        self,
        arch: TargetArchitecture,
        *,
        stack: tuple[int, ...] = (),
        scale: float = 0.02,
        rngs: nnx.Rngs,
        kind: str = FULL,
        scalar: bool = False,
    ):
        sandwich = arch.model_type == "gemma4"
        self.attention_norm = ones(stack, arch.hidden_size)
        self.attention = Attention(arch, stack=stack, scale=scale, rngs=rngs, kind=kind)
        self.attention_out_norm = ones(stack, arch.hidden_size) if sandwich else None
        self.mlp_norm = ones(stack, arch.hidden_size)
        self.mlp = MLP(arch, stack=stack, scale=scale, rngs=rngs)
        self.mlp_out_norm = ones(stack, arch.hidden_size) if sandwich else None
        self.scalar = ones(stack, 1) if scalar else None
        self.eps = arch.rms_norm_eps

    def __call__(self, x: jax.Array, attention: Callable[["Attention", jax.Array], jax.Array]) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; `attention(projections, normed x)` returns the heads [B, T, N, H]."""
        heads = attention(self.attention, rms_norm(x, self.attention_norm[...], self.eps))
        x = x + self._normed(self.attention.output(heads), self.attention_out_norm)
        x = x + self._normed(self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)), self.mlp_out_norm)
        return x if self.scalar is None else x * self.scalar[...].astype(x.dtype)

    def _normed(self, x: jax.Array, norm: Param | None) -> jax.Array:
        return x if norm is None else rms_norm(x, norm[...], self.eps)


def layer_at(layers: Any, index: jax.Array | int) -> Any:
    """Layer `index` of a stack (leading axis L), its weights gathered; inside a loop the stack is never copied."""
    if isinstance(layers, nnx.List):  # see `decode_weights`
        assert isinstance(index, int), "a list of layers is indexed at trace time"
        return layers[index]

    def pick(leaf: Any) -> Any:
        stack = leaf.get_value() if isinstance(leaf, Param) else leaf
        value = stack[index] if isinstance(index, int) else jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
        return leaf.replace(gather(value, *leaf.axes[1:])) if isinstance(leaf, Param) else value

    return jax.tree.map(pick, layers, is_leaf=lambda leaf: isinstance(leaf, Param))


def run_layers(body: Callable[[Any, Any], Any], carry: Any, start: int, stop: int, *, one_by_one: bool) -> Any:
    """Applies `body(carry, index) -> carry` for the layers start..stop-1, as one loop or one by one."""
    if one_by_one or stop - start == 1:
        for index in range(start, stop):
            carry = body(carry, index)
        return carry
    return jax.lax.fori_loop(start, stop, lambda index, state: body(state, index), carry)


def run_pattern(
    pattern: Sequence[str], body: Callable[[Any, str, Any, Any], Any], carry: Any, count: int, *, one_by_one: bool
) -> Any:
    """Applies `body(carry, kind, index, number) -> carry` for all layers of a model of several kinds of layers.

    Layer `number` is of kind pattern[number % len(pattern)]; each kind has a stack of its own, in which `index` counts.
    Whole periods become one loop around one body per run of a kind, so what is compiled does not grow with the depth.

    Args:
      pattern: kinds of a period.
      body: one layer; the numbers are Python's own where the layers go one by one.
      carry: goes from layer to layer.
      count: layers, a multiple of the period.
      one_by_one: no loop; lists of layers have none.
    """
    period = len(pattern)
    assert count % period == 0, "the pattern repeats itself"
    runs = [(kind, len(list(same))) for kind, same in itertools.groupby(pattern)]

    def cycle(carry: Any, at: Any) -> Any:
        first, seen = at * period, dict.fromkeys(pattern, 0)
        for kind, length in runs:
            before = at * pattern.count(kind) + seen[kind]

            def step(carry: Any, offset: Any, kind: str = kind, before: Any = before, first: Any = first) -> Any:
                return body(carry, kind, before + offset, first + offset)

            carry = run_layers(step, carry, 0, length, one_by_one=one_by_one)
            first, seen[kind] = first + length, seen[kind] + length
        return carry

    return run_layers(cycle, carry, 0, count // period, one_by_one=one_by_one)
