"""Transformer pieces shared by every target and drafter: norm, RoPE, attention projections, MLP, layer stacks.

Parameters of a stack of layers carry one leading axis L, so that one compiled body serves all of them. What the
families of models differ in is stated in a `LayerShape`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax import platform
from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.product import product
from dspark_jax.recompute import dear
from dspark_jax.sharding import Param, constrain, gather
from dspark_jax.target import families
from dspark_jax.target.families.family import AttentionShape, LayerShape

GATES = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
"""Functions of an MLP's gate by name."""


def gated(gate: jax.Array, up: jax.Array, function: str, limit: float = 0.0) -> jax.Array:
    """What a gated MLP multiplies with its last matrix; `limit` bounds the gate from above, and what is beside it."""
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return GATES[function](gate) * up


def normal(
    rngs: nnx.Rngs, stack: tuple[int, ...], shape: tuple[int, ...], axes: tuple[str, ...], scale: float
) -> Param:
    """A normally distributed float32 parameter [*stack, *shape]."""
    value = scale * jax.random.normal(rngs.params(), stack + shape, jnp.float32)
    return Param(value, axes=("layers",) * len(stack) + axes)


def ones(stack: tuple[int, ...], size: int, axis: str = "norm") -> Param:
    """A parameter of ones [*stack, size]: the weight of an RMS norm."""
    return Param(jnp.ones((*stack, size), jnp.float32), axes=("layers",) * len(stack) + (axis,))


def norm_weight(stack: tuple[int, ...], size: int, *, centred: bool) -> Param:
    """The weight of an RMS norm that changes nothing: ones, or zeros where it is what is to be added to 1."""
    return zeros(stack, (size,), ("norm",)) if centred else ones(stack, size)


def zeros(stack: tuple[int, ...], shape: tuple[int, ...], axes: tuple[str, ...]) -> Param:
    """A parameter of zeros [*stack, *shape]: the bias of a linear layer."""
    return Param(jnp.zeros(stack + shape, jnp.float32), axes=("layers",) * len(stack) + axes)


def narrow(weight: Param | None, dtype: Any) -> None:
    """Holds a matrix as `dtype` from now on. (Setting `weight[...]` would convert it back to the type it had.)"""
    if weight is not None and weight[...].dtype != dtype:
        weight.set_value(weight[...].astype(dtype))


def stay_stacked(weight: Param) -> None:
    """From now on `layer_at` gives the stack of this parameter whole: what multiplies by it reads its part there."""
    weight.set_metadata(stays_stacked=True)


def turn_across(weight: Param | None) -> None:
    """Holds a matrix of heads [*stack, D, N, H] as [*stack, N, H, D] from now on, where products want it so.

    `linear` reads either.
    """
    if weight is None or platform.joins_heads():
        return
    first = int(weight.axes[0] == "layers")
    axes = (*weight.axes[:first], *weight.axes[first + 1 :], weight.axes[first])
    value = constrain(jnp.moveaxis(weight[...], first, -1), *axes)
    weight.set_metadata(axes=axes, across=True)
    weight.set_value(value)


def linear(x: jax.Array, weight: Param, bias: Param | None = None) -> jax.Array:
    """x [..., D] times a matrix [D, ...], or one that is held across, with a bias if there is one."""
    if weight.get_metadata().get("across"):
        matrix = weight[...].astype(x.dtype)
        out = jnp.tensordot(x, matrix, (-1, -1), preferred_element_type=x.dtype)
    else:
        out = dense(x, weight[...])
    return out if bias is None else out + bias[...].astype(out.dtype)


def dense(x: jax.Array, weight: jax.Array, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` axes of x with the first ones of weight, as one 2-D product (CPU's fast path).

    See `ops.product`; the result has x's type, its leading axes, and then the weight's remaining ones.
    """
    if inputs == 2 and not platform.joins_heads():
        return dear(jnp.tensordot(x, weight.astype(x.dtype), inputs, preferred_element_type=x.dtype))
    lead, width = x.shape[: x.ndim - inputs], math.prod(weight.shape[:inputs])
    out = product(x.reshape(-1, width), weight.reshape(width, -1))
    return dear(out.reshape(lead + weight.shape[inputs:]))


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float, *, centred: bool = False) -> jax.Array:
    """x / rms(x) * weight (if any) over the last axis, computed in float32, returned in x's type.

    `centred`: the factor is 1 + weight.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if weight is not None:
        factor = weight.astype(jnp.float32)
        x32 = x32 * (1 + factor if centred else factor)
    return x32.astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, theta: float, turns: tuple[float, ...] = ()) -> jax.Array:
    """Rotary embedding of x [..., T, N, H] at positions [..., T]; halves are rotated, phases are float32.

    `turns` are factors of the frequencies of the H/2 pairs; empty: all 1.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if turns:
        frequency = frequency * jnp.asarray(turns, jnp.float32)
    phase = positions.astype(jnp.float32)[..., None, None] * frequency
    sin, cos = jnp.sin(phase), jnp.cos(phase)
    if x.dtype == jnp.bfloat16 and platform.swaps_by_product():  # other types would be rounded to it
        swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=1)
        swapped = jnp.einsum("...h,hg->...g", x, swap, preferred_element_type=x.dtype).astype(jnp.float32)
        sin, cos = jnp.concatenate([-sin, sin], axis=-1), jnp.concatenate([cos, cos], axis=-1)
        return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def drafter_layer(arch: TargetArchitecture) -> tuple[TargetArchitecture, LayerShape]:
    """The shape of a drafter for a target of shape `arch`, and what its layers are like; stored scalars are all 1."""
    shape = families.of_shape(arch).drafter_shape(arch)
    return shape, dataclasses.replace(families.of_shape(shape).layer(shape), scalar=False)


class Attention(nnx.Module):
    """Projections of grouped-query attention, usually with per-head RMS norms on queries and keys.

    `shape` is None for a drafter's.
    """

    def __init__(
        self,
        arch: TargetArchitecture,
        *,
        stack: tuple[int, ...],
        scale: float,
        rngs: nnx.Rngs,
        shape: AttentionShape | None = None,
        centred: bool = False,
    ):
        self.shape = drafter_layer(arch)[1].attention if shape is None else shape
        d, n, k, h = arch.hidden_size, self.shape.heads, self.shape.kv_heads, self.shape.width
        wide = 2 * h if self.shape.gated else h  # a head's query, and then its gate
        self.query: Any = normal(rngs, stack, (d, n, wide), ("embed", "heads", "head_width"), scale)
        self.key: Any = normal(rngs, stack, (d, k, h), ("embed", "kv_heads", "head_width"), scale)
        own = not self.shape.value_is_key
        value = normal(rngs, stack, (d, k, h), ("embed", "kv_heads", "head_width"), scale) if own else None
        self.value: Any = value
        self.out = normal(rngs, stack, (n, h, d), ("heads", "head_width", "embed"), scale)
        self.query_norm: Any = norm_weight(stack, h, centred=centred) if self.shape.norms else None
        self.key_norm: Any = norm_weight(stack, h, centred=centred) if self.shape.norms else None
        biases = self.shape.biases
        self.query_bias: Any = zeros(stack, (n, h), ("heads", "head_width")) if biases else None
        self.key_bias: Any = zeros(stack, (k, h), ("kv_heads", "head_width")) if biases else None
        self.value_bias: Any = zeros(stack, (k, h), ("kv_heads", "head_width")) if biases and own else None
        self.out_bias: Any = zeros(stack, (d,), ("norm",)) if self.shape.out_bias else None
        self.sinks: Any = zeros(stack, (n,), ("heads",)) if self.shape.sinks else None
        self.eps, self.centred = arch.rms_norm_eps, centred
        self.reads_context = False  # keys and values are asked for alone as well: a drafter's

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [B, T, D], positions [B, T] -> normed and rotated queries [B, T, N, H]."""
        query = linear(x, self.query, self.query_bias)
        return self._turn(query[..., : self.shape.width], self.query_norm, positions)

    def keys_values(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D], positions [B, T] -> normed and rotated keys, and values, both [B, T, K, H]."""
        key = linear(x, self.key, self.key_bias)
        value = key if self.value is None else linear(x, self.value, self.value_bias)
        return self._turn(key, self.key_norm, positions), self._values(value)

    def all(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`queries` and `keys_values` of the same rows; in one product after `fuse_weights`."""
        return self.all_gated(x, positions)[:3]

    def all_gated(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """`all`, and the heads' gates.

        Gates [B, T, N, H] are what the sigmoid is taken of; None where heads have none.
        """
        n, k, h = self.shape.heads, self.shape.kv_heads, self.shape.width
        if getattr(self, "joint", None) is None:
            query = linear(x, self.query, self.query_bias)
            gate = query[..., h:] if self.shape.gated else None
            return self._turn(query[..., :h], self.query_norm, positions), *self.keys_values(x, positions), gate
        heads = linear(x, self.joint, self.joint_bias)
        gate = None
        if self.shape.gated:
            heads, gate = heads[..., :-n, :], heads[..., -n:, :]
        turned = self._turn(heads[..., : n + k, :], self.joint_norm, positions)
        return turned[..., :n, :], turned[..., n:, :], self._values(heads[..., -k:, :]), gate

    def _turn(self, heads: jax.Array, norm: Param | None, positions: jax.Array) -> jax.Array:
        heads = heads if norm is None else rms_norm(heads, norm[...], self.eps, centred=self.centred)
        turning = heads[..., : self.shape.rotary or self.shape.width]
        turned = rope(turning, positions, self.shape.theta, self.shape.turns)
        return jnp.concatenate([turned, heads[..., self.shape.rotary :]], axis=-1) if self.shape.rotary else turned

    def _values(self, value: jax.Array) -> jax.Array:
        return rms_norm(value, None, self.eps) if self.shape.value_norm else value

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `decode_weights`; joined are those of a single layer."""
        for weight in (self.query, self.key, self.value, self.out):
            narrow(weight, dtype)
        if not join:
            for weight in (self.query, self.key, self.value):
                turn_across(weight)
            return
        query, key, h = self.query[...], self.key[...], self.shape.width
        parts = [query[..., :h], key] if self.value is None else [query[..., :h], key, self.value[...]]
        parts += [query[..., h:]] if self.shape.gated else []
        self.joint = Param(jnp.concatenate(parts, axis=1), axes=("embed", None, None))
        biases = [bias[...] for bias in (self.query_bias, self.key_bias, self.value_bias) if bias is not None]
        self.joint_bias: Any = Param(jnp.concatenate(biases), axes=(None,) * 2) if biases else None
        norms = [jnp.broadcast_to(norm[...], (part.shape[1], h)) for norm, part in
                 ((self.query_norm, query), (self.key_norm, key)) if norm is not None]  # fmt: skip
        self.joint_norm: Any = Param(jnp.concatenate(norms), axes=(None,) * 2) if norms else None
        # Nothing is kept twice but what a drafter reads of a context alone.
        self.query = self.query_norm = self.query_bias = None
        if not self.reads_context:
            self.key = self.key_norm = self.key_bias = self.value = self.value_bias = None

    def output(self, x: jax.Array) -> jax.Array:
        """Heads [B, T, N, H] -> [B, T, D]."""
        out = dense(x, self.out[...], inputs=2)
        return out if self.out_bias is None else out + self.out_bias[...].astype(out.dtype)


class MLP(nnx.Module):
    """Gated feed-forward layer; `gate` is one of `GATES`, `limit` as in `gated`, `width` its own; 0: the target's."""

    def __init__(
        self,
        arch: TargetArchitecture,
        *,
        stack: tuple[int, ...],
        scale: float,
        rngs: nnx.Rngs,
        gate: str = "silu",
        width: int = 0,
        limit: float = 0.0,
    ):
        d, f = arch.hidden_size, width or arch.intermediate_size
        self.gate: Any = normal(rngs, stack, (d, f), ("embed", "mlp"), scale)
        self.up: Any = normal(rngs, stack, (d, f), ("embed", "mlp"), scale)
        self.down = normal(rngs, stack, (f, d), ("mlp", "embed"), scale)
        self.function, self.limit = gate, limit

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        if getattr(self, "joint", None) is None:
            gate, up = dense(x, self.gate[...]), dense(x, self.up[...])
        else:
            gate, up = jnp.split(dense(x, self.joint[...]), 2, axis=-1)
        return dense(gated(gate, up, self.function, self.limit), self.down[...])

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `decode_weights`; joined are those of a single layer."""
        narrow(self.down, dtype)
        if not join:
            narrow(self.gate, dtype)
            narrow(self.up, dtype)
            return
        joint = jnp.concatenate([self.gate[...].astype(dtype), self.up[...].astype(dtype)], axis=1)
        self.joint, self.gate, self.up = Param(joint, axes=("embed", None)), None, None


class Layer(nnx.Module):
    """Pre-norm transformer layer (or a stack of them, by a leading axis on every parameter).

    What attention and MLP give may be normed once more before it is added, and the layer's output be multiplied with a
    stored scalar.

    Attributes:
      family: the name of the family whose layer it is.
    """

    def __init__(
        self,
        arch: TargetArchitecture,
        *,
        stack: tuple[int, ...] = (),
        scale: float = 0.02,
        rngs: nnx.Rngs,
        shape: LayerShape | None = None,
        around: tuple[Any, Any] = (None, None),
    ):
        """A random layer like `shape`; None: that of a drafter for a target of shape `arch`.

        `around` are modules that a drafter puts around attention and MLP, (normed x, the sublayer) -> [B, T, D].
        """
        if shape is None:
            arch, shape = drafter_layer(arch)
        self.family = arch.model_type
        self.centred = shape.centred
        norm = functools.partial(norm_weight, stack, arch.hidden_size, centred=shape.centred)
        self.attention_norm = norm()
        self.attention: Any = self._attention(arch, shape, {"stack": stack, "scale": scale, "rngs": rngs})
        self.attention_out_norm = norm() if shape.out_norms else None
        self.mlp_norm = norm()
        self.mlp: Any = self._mlp(arch, shape, {"stack": stack, "scale": scale, "rngs": rngs, "gate": shape.gate})
        self.mlp_out_norm = norm() if shape.out_norms else None
        self.scalar = ones(stack, 1) if shape.scalar else None
        self.eps = arch.rms_norm_eps
        self.around_attention, self.around_mlp = around

    def __call__(self, x: jax.Array, attention: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; `attention(projections, normed x)` returns the heads [B, T, N, H].

        The projections are an `Attention`, or what is there in its place.
        """

        def attend(normed: jax.Array) -> jax.Array:
            return self.attention.output(attention(self.attention, normed))

        normed = self._normed(x, self.attention_norm)
        out = attend(normed) if self.around_attention is None else self.around_attention(normed, attend)
        x = x + self._normed(out, self.attention_out_norm)
        normed = self._normed(x, self.mlp_norm)
        out = self.mlp(normed) if self.around_mlp is None else self.around_mlp(normed, self.mlp)
        x = x + self._normed(out, self.mlp_out_norm)
        return x if self.scalar is None else x * self.scalar[...].astype(x.dtype)

    def _attention(self, arch: TargetArchitecture, shape: LayerShape, how: dict[str, Any]) -> Any:
        """The attention, or what is there in its place."""
        if shape.compressed is not None:
            from dspark_jax.target.compressed import CompressedAttention  # which is made of parts of this module

            return CompressedAttention(arch, shape.compressed, **how)
        if shape.delta is None:
            return Attention(arch, shape=shape.attention, centred=shape.centred, **how)
        from dspark_jax.target.delta import GatedDelta  # which is made of parts of this module

        return GatedDelta(arch, shape.delta, **how)

    def _mlp(self, arch: TargetArchitecture, shape: LayerShape, how: dict[str, Any]) -> Any:
        """The MLP, or what is there in its place."""
        if shape.experts is None:
            return MLP(arch, **how)
        from dspark_jax.target.experts import Experts  # which is made of parts of this module

        return Experts(arch, shape.experts, **how)

    def _normed(self, x: jax.Array, norm: Param | None) -> jax.Array:
        return x if norm is None else rms_norm(x, norm[...], self.eps, centred=self.centred)


def layer_at(layers: Any, index: jax.Array | int) -> Any:
    """Layer `index` of a stack (leading axis L), its weights gathered; inside a loop the stack is never copied.

    Parameters that `stay_stacked` are whole.
    """
    if isinstance(layers, nnx.List):  # see `decode_weights`
        assert isinstance(index, int), "a list of layers is indexed at trace time"
        return layers[index]

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Param) and leaf.get_metadata().get("stays_stacked"):
            return leaf
        stack = leaf.get_value() if isinstance(leaf, Param) else leaf
        value = stack[index] if isinstance(index, int) else jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
        return leaf.replace(gather(value, *leaf.axes[1:]), axes=leaf.axes[1:]) if isinstance(leaf, Param) else value

    return jax.tree.map(pick, layers, is_leaf=lambda leaf: isinstance(leaf, Param))


def run_layers(body: Callable[[Any, Any], Any], carry: Any, start: int, stop: int, *, one_by_one: bool) -> Any:
    """Applies `body(carry, index) -> carry` for the layers start..stop-1, as one loop or one by one."""
    if one_by_one or stop - start == 1:
        for index in range(start, stop):
            carry = body(carry, index)
        return carry
    return jax.lax.fori_loop(start, stop, lambda index, state: body(state, index), carry)


def run_pattern(
    first: Sequence[str],
    pattern: Sequence[str],
    body: Callable[[Any, str, Any, Any], Any],
    carry: Any,
    count: int,
    *,
    one_by_one: bool,
) -> Any:
    """Applies `body(carry, kind, index, number) -> carry` for all layers of a model of several kinds of layers.

    Layer `number` is of kind first[number], and beyond these of the kinds of `pattern`, again and again; each kind has
    a stack of its own, in which `index` counts. Whole periods become one loop around one body per run of a kind, so
    what is compiled does not grow with the depth.

    Args:
      first: kinds of the layers before the first period.
      pattern: kinds of a period.
      body: one layer; the numbers are Python's own where the layers go one by one.
      carry: goes from layer to layer.
      count: layers: `first`, and a multiple of the period.
      one_by_one: no loop; lists of layers have none.
    """
    begin, period = len(first), len(pattern)
    assert (count - begin) % period == 0, "the pattern repeats itself"

    def run(kinds: Sequence[str], carry: Any, number: Any, seen: dict[str, Any]) -> Any:
        for kind, same in itertools.groupby(kinds):
            length, before = len(list(same)), seen[kind]

            def step(carry: Any, offset: Any, kind: str = kind, before: Any = before, number: Any = number) -> Any:
                return body(carry, kind, before + offset, number + offset)

            carry = run_layers(step, carry, 0, length, one_by_one=one_by_one)
            number, seen[kind] = number + length, before + length
        return carry

    def cycle(carry: Any, at: Any) -> Any:
        seen = {kind: first.count(kind) + at * pattern.count(kind) for kind in pattern}
        return run(pattern, carry, begin + at * period, seen)

    carry = run(first, carry, 0, dict.fromkeys(first, 0))
    return run_layers(cycle, carry, 0, (count - begin) // period, one_by_one=one_by_one)
