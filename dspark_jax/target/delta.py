"""Linear attention by the gated delta rule, with a short convolution in front of it (Qwen3.5; Qwen3-Next has it too).

A key head has a query, a key and R values of each row. All of them pass a causal convolution of each channel alone and
SiLU; queries and keys are then normed. The state of a value head is `ops.delta_rule`'s.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.delta_rule import delta_rule
from dspark_jax.sharding import Param, per_device
from dspark_jax.target.attend import Pass
from dspark_jax.target.delta_cache import DeltaCache
from dspark_jax.target.families.family import DeltaShape
from dspark_jax.target.layers import dense, linear, narrow, normal, ones, rms_norm, turn_across, zeros


class GatedDelta(nnx.Module):
    """Projections of linear attention, and what is around its rule; M = 2 H + R W channels of each of K key heads."""

    def __init__(
        self, arch: TargetArchitecture, shape: DeltaShape, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs
    ):
        self.shape, self.eps = shape, arch.rms_norm_eps
        d, k, r, m = arch.hidden_size, shape.heads, shape.values, sum(shape.pieces)
        values = r * shape.value_width
        axes = ("embed", "heads", "head_width")
        self.mixed: Any = normal(rngs, stack, (d, k, m), axes, scale)
        self.gate: Any = normal(rngs, stack, (d, k, values), axes, scale)
        self.rate: Any = normal(rngs, stack, (d, k, r), axes, scale)
        self.decay: Any = normal(rngs, stack, (d, k, r), axes, scale)
        self.filters = normal(rngs, stack, (k, m, shape.taps), ("heads", "head_width", "taps"), scale)
        self.decay_scale = zeros(stack, (k, r), ("heads", "head_width"))  # the logarithm
        self.decay_bias = zeros(stack, (k, r), ("heads", "head_width"))
        self.norm = ones(stack, shape.value_width)
        self.out = normal(rngs, stack, (k, values, d), ("heads", "head_width", "embed"), scale)

    def all(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> what is to be convolved [B, T, K, M], decays and rates [B, T, K, R], gates [B, T, K, R W]."""
        if getattr(self, "joint", None) is None:
            mixed, gate, rate, decay = (linear(x, w) for w in (self.mixed, self.gate, self.rate, self.decay))
        else:
            m, r = sum(self.shape.pieces), self.shape.values
            w = r * self.shape.value_width
            parts = jnp.split(dense(x, self.joint[...]), (m, m + w, m + w + r), axis=-1)
            mixed, gate, rate, decay = parts
        steps = jax.nn.softplus(decay.astype(jnp.float32) + self.decay_bias[...].astype(jnp.float32))
        decay = -jnp.exp(self.decay_scale[...].astype(jnp.float32)) * steps
        return mixed, decay, jax.nn.sigmoid(rate.astype(jnp.float32)), gate

    def normed(self, heads: jax.Array, gate: jax.Array) -> jax.Array:
        """What the rule gives [B, T, K, R, W], normed and gated: [B, T, K, R W] in the gates' type."""
        heads = rms_norm(heads, self.norm[...], self.eps).reshape(gate.shape)
        return (heads * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)

    def output(self, heads: jax.Array) -> jax.Array:
        """`normed` [B, T, K, R W] -> [B, T, D]."""
        return dense(heads, self.out[...], inputs=2)

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `decode_weights`; joined are those of a single layer."""
        narrow(self.out, dtype)
        parts = [self.mixed, self.gate, self.rate, self.decay]
        if not join:
            for weight in parts:
                narrow(weight, dtype)
                turn_across(weight)
            return
        joint = jnp.concatenate([weight[...].astype(dtype) for weight in parts], axis=-1)
        self.joint = Param(joint, axes=("embed", None, None))
        self.mixed = self.gate = self.rate = self.decay = None


def recall(
    part: Any, index: jax.Array | int, projections: GatedDelta, normed: jax.Array, run: Pass
) -> tuple[Any, jax.Array]:
    """Heads of the rows of a pass through a layer of linear attention; as `attend.attend`, with a `DeltaCache`."""
    mixed, decay, rate, gate = projections.all(normed)
    own, filters, shape = (mixed, decay, rate), projections.filters[...], projections.shape
    if part is None:
        out = _from_nothing(own, filters, shape, run.starts)
    elif run.rows is None:
        part, out = _from_cache(part, index, own, filters, shape, run.positions[:, 0], run.counts)
    else:
        padded = run.rows.pad(mixed[0]), run.rows.pad(decay[0]), run.rows.pad(rate[0])
        part, out = _from_cache(part, index, padded, filters, shape, run.rows.positions, None)
        out = run.rows.flatten(out)[None]
    return part, projections.normed(out, gate)


Own = tuple[jax.Array, jax.Array, jax.Array]  # a pass's [B, S, K, M] before the convolution; decays, rates [B, S, K, R]
ROWS, FILTERS = ("batch", None, "heads", None), ("heads", None, None)


def _from_nothing(own: Own, filters: jax.Array, shape: DeltaShape, starts: jax.Array | None) -> jax.Array:
    """What the rule gives for whole texts, which may be packed: [B, S, K, R, W]."""

    def here(mixed: jax.Array, decay: jax.Array, rate: jax.Array, filters: jax.Array, *starts: jax.Array) -> Any:
        rows = jnp.pad(mixed, ((0, 0), (shape.taps - 1, 0), (0, 0), (0, 0)))
        query, key, value = _convolved(rows, filters, shape, *starts)
        batch, _, heads, _ = mixed.shape
        state = jnp.zeros((batch, heads, shape.values, shape.width, shape.value_width), jnp.float32)
        packed = starts[0] if starts else None
        return (delta_rule(query, key, value, decay, rate, state, starts=packed)[0],)

    packed = () if starts is None else (starts,)
    inputs = (ROWS, ROWS, ROWS, FILTERS, *(("batch", None) for _ in packed))
    return per_device(here, inputs, ((*ROWS, None),))(*own, filters, *packed)[0]


def _from_cache(
    part: DeltaCache,
    index: jax.Array | int,
    own: Own,
    filters: jax.Array,
    shape: DeltaShape,
    first: jax.Array,
    counts: jax.Array | None,
) -> tuple[DeltaCache, jax.Array]:
    """The same for S rows of every request from position first[b] on, of which counts[b] are real; and the cache.

    The rows before `first` that the state does not know yet enter it. Of the pass's own rows none do if they are so few
    that the next pass may take them back; else all real ones.
    """
    before = shape.taps - 1

    def here(mixed: jax.Array, decay: jax.Array, rate: jax.Array, filters: jax.Array, *cached: jax.Array) -> Any:
        first, counts, state, rows, old_decay, old_rate, at = cached
        size, block = mixed.shape[1], old_decay.shape[1]
        begins = (first == 0)[:, None, None, None]
        state = jnp.where(begins[..., None], 0, state)
        late = jnp.clip(first - at, 0, block)  # none where a request begins
        known = (jnp.arange(block) < late[:, None])[..., None, None]
        real = (jnp.arange(size) < counts[:, None])[..., None, None]
        tail = jnp.where(begins, 0, _rows_from(rows, late, before))
        after = jnp.concatenate([tail, mixed.astype(rows.dtype)], axis=1)  # what the convolution reads of the pass
        heads = [_convolved(x, filters, shape) for x in (rows, after)]
        query, key, value = (jnp.concatenate(both, axis=1) for both in zip(*heads, strict=True))
        decays, rates = (
            jnp.concatenate([jnp.where(known, old, 0), jnp.where(real, new, 0)], axis=1)
            for old, new in ((old_decay, decay), (old_rate, rate))
        )
        few = size <= block
        out, state = delta_rule(query, key, value, decays, rates, state, kept=block if few else None)
        if few:
            room = ((0, 0), (0, block - size), (0, 0), (0, 0))
            kept = (state, *(jnp.pad(x, room) for x in (after, decay, rate)), first)
        else:
            empty = jnp.zeros_like(rows[:, :block])
            last = jnp.concatenate([_rows_from(after, counts, before), empty], axis=1)
            kept = (state, last, jnp.zeros_like(old_decay), jnp.zeros_like(old_rate), first + counts)
        return (out[:, block:], *kept)

    counts = jnp.full_like(first, own[0].shape[1]) if counts is None else counts
    cached = part.axes
    inputs = (ROWS, ROWS, ROWS, FILTERS, ("batch",), ("batch",), *cached)
    out, *kept = per_device(here, inputs, ((*ROWS, None), *cached))(*own, filters, first, counts, *part.layer(index))
    return part.put(index, kept), out


def _rows_from(rows: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """rows [B, T, ...] -> `count` of them of each request from first[b] on."""
    return jnp.take_along_axis(rows, (first[:, None] + jnp.arange(count))[..., None, None], axis=1)


def _convolved(
    rows: jax.Array, filters: jax.Array, shape: DeltaShape, starts: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of rows [B, taps - 1 + T, K, M], of which the first ones are only looked back at.

    `starts` [B, T]: first row of each row's document, before which nothing is seen.
    """
    count = rows.shape[1] - shape.taps + 1
    rows, filters = rows.astype(jnp.float32), filters.astype(jnp.float32)
    total = jnp.zeros(())
    for tap in range(shape.taps):
        seen = rows[:, tap : tap + count]
        if starts is not None:
            inside = jnp.arange(count) - (shape.taps - 1 - tap) >= starts
            seen = jnp.where(inside[..., None, None], seen, 0)
        total = total + seen * filters[..., tap]
    width = shape.width
    query, key, value = jnp.split(jax.nn.silu(total), (width, 2 * width), axis=-1)
    value = value.reshape(*value.shape[:-1], shape.values, shape.value_width)
    return _unit(query) / math.sqrt(width), _unit(key), value


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis; as transformers has it, 1e-6 keeps zeros from becoming infinite."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
