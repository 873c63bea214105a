"""Attention to a window of rows and to compressed rows before it (DeepSeek-V4).

All heads share one key per row, which is the value as well; so what they give still has the rotation of the rows that
it comes from, and is turned back by that of its own row. A compressed row is a gated mean of m rows, or of 2 m, where
each row takes part in two: with one series of numbers in its own and with another one in the next. Of the latter kind
an index chooses the few that a query sees. Every head has a sink, a score that takes part in no output.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.sharding import per_device
from dspark_jax.target.attend import Pass
from dspark_jax.target.compressed_attend import Made, Own, attended
from dspark_jax.target.compressed_cache import CompressedCache, before, with_made, with_rows
from dspark_jax.target.families.family import CompressedShape, IndexShape
from dspark_jax.target.layers import dense, linear, narrow, normal, ones, rms_norm, turn_across, zeros

_NEVER = 1 << 30
"""Where compressed rows end that there are not."""


class Compressor(nnx.Module):
    """What compressed rows of width H are made with."""

    def __init__(
        self,
        arch: TargetArchitecture,
        shape: CompressedShape,
        width: int,
        *,
        stack: tuple[int, ...],
        scale: float,
        rngs: nnx.Rngs,
    ):
        self.shape, self.eps, self.width = shape, arch.rms_norm_eps, width
        d, s = arch.hidden_size, shape.series
        self.row = normal(rngs, stack, (d, s * width), ("embed", "head_width"), scale)
        self.gate = normal(rngs, stack, (d, s * width), ("embed", "head_width"), scale)
        self.bias = zeros(stack, (shape.rate, s * width), ("taps", "head_width"))
        self.norm = ones(stack, width)

    def raw(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> what rows give and its gates, [B, T, 2, s, H]."""
        both = [dense(x, weight[...]).reshape(*x.shape[:-1], -1, self.width) for weight in (self.row, self.gate)]
        return jnp.stack(both, axis=-3)

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `decode_weights`; nothing is joined."""
        del join
        for weight in (self.row, self.gate):
            narrow(weight, dtype)


class Index(nnx.Module):
    """What chooses among compressed rows: a few small heads, and compressed rows of its own."""

    def __init__(
        self,
        arch: TargetArchitecture,
        shape: CompressedShape,
        index: IndexShape,
        *,
        stack: tuple[int, ...],
        scale: float,
        rngs: nnx.Rngs,
    ):
        self.shape = index
        size = (shape.query_rank, index.heads, index.width)
        self.query = normal(rngs, stack, size, ("rank", "index_heads", "head_width"), scale)
        self.weigh = normal(rngs, stack, (arch.hidden_size, index.heads), ("embed", "index_heads"), scale)
        self.compressor = Compressor(arch, shape, index.width, stack=stack, scale=scale, rngs=rngs)

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `decode_weights`; nothing is joined."""
        del join
        for weight in (self.query, self.weigh):
            narrow(weight, dtype)
        turn_across(self.query)


class CompressedAttention(nnx.Module):
    """Projections of attention with compressed rows; N heads of width H, `Own` is what a pass has of them."""

    def __init__(
        self, arch: TargetArchitecture, shape: CompressedShape, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs
    ):
        self.shape, self.eps = shape, arch.rms_norm_eps
        d, n, h = arch.hidden_size, shape.heads, shape.width
        narrower = shape.groups * shape.group_rank
        how = {"stack": stack, "scale": scale, "rngs": rngs}
        self.query_in = normal(rngs, stack, (d, shape.query_rank), ("embed", "rank"), scale)
        self.query_norm = ones(stack, shape.query_rank)
        self.query = normal(rngs, stack, (shape.query_rank, n, h), ("rank", "heads", "head_width"), scale)
        self.row = normal(rngs, stack, (d, h), ("embed", "head_width"), scale)
        self.row_norm = ones(stack, h)
        self.sinks = zeros(stack, (n,), ("heads",))
        self.group = normal(rngs, stack, (narrower, n * h // shape.groups), ("heads", "head_width"), scale)
        self.out = normal(rngs, stack, (narrower, d), ("heads", "embed"), scale)
        self.compressor: Any = Compressor(arch, shape, h, **how) if shape.rate else None
        self.index: Any = Index(arch, shape, shape.index, **how) if shape.index else None

    def own(self, x: jax.Array, positions: jax.Array) -> Own:
        """x [B, S, D], positions [B, S] -> what the rows of a pass give."""
        low = rms_norm(dense(x, self.query_in[...]), self.query_norm[...], self.eps)
        query = self._turned(rms_norm(linear(low, self.query), None, self.eps), positions[..., None])
        row = self._turned(rms_norm(dense(x, self.row[...]), self.row_norm[...], self.eps), positions)
        raw = None if self.compressor is None else self.compressor.raw(x)
        if self.index is None:
            return Own(query, row, raw)
        index_query = self._turned(linear(low, self.index.query), positions[..., None])
        weigh = dense(x, self.index.weigh[...])
        return Own(query, row, raw, index_query, weigh, self.index.compressor.raw(x))

    def turned_back(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
        """Heads [B, S, N, H] without the rotation of the rows at positions [B, S]."""
        return self._turned(heads, -positions[..., None])

    def output(self, heads: jax.Array) -> jax.Array:
        """Heads [B, S, N, H], turned back -> [B, S, D]."""
        shape = self.shape
        grouped = heads.reshape(*heads.shape[:2], shape.groups, -1)
        matrix = self.group[...].astype(heads.dtype).reshape(shape.groups, shape.group_rank, -1)
        narrower = jnp.einsum("bsgx,grx->bsgr", grouped, matrix, preferred_element_type=heads.dtype)
        return dense(narrower.reshape(*heads.shape[:2], -1), self.out[...])

    def _turned(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return turned(x, positions, self.shape)

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `decode_weights`; nothing is joined."""
        del join
        for weight in (self.query_in, self.query, self.row, self.group, self.out):
            narrow(weight, dtype)
        turn_across(self.query)


def turned(x: jax.Array, positions: jax.Array, shape: CompressedShape) -> jax.Array:
    """x [..., H] with the pairs of neighbours at the end of its last axis turned, by positions that broadcast to [...].

    Phases are float32.
    """
    pairs = shape.rotary // 2
    frequency = shape.theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    if shape.turns:
        frequency = frequency * jnp.asarray(shape.turns, jnp.float32)
    phase = positions.astype(jnp.float32)[..., None] * frequency
    sin, cos = jnp.sin(phase), jnp.cos(phase)
    still, turning = x[..., : -shape.rotary], x[..., -shape.rotary :].astype(jnp.float32)
    first, second = turning[..., 0::2], turning[..., 1::2]
    both = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([still, both.reshape(turning.shape).astype(x.dtype)], axis=-1)


def look(
    part: Any, index: jax.Array | int, projections: CompressedAttention, normed: jax.Array, run: Pass
) -> tuple[Any, jax.Array]:
    """Heads of the rows of a pass through a layer; as `attend.attend`, with a `CompressedCache`."""
    own = projections.own(normed, run.positions)
    if part is None:
        heads = _from_nothing(own, projections, run.positions, run.starts)
    elif run.rows is None:
        part, heads = _from_cache(part, index, own, projections, run.positions[:, 0], run.counts)
    else:
        flat = run.rows
        padded = jax.tree.map(lambda x: flat.pad(x[0]), own)
        part, heads = _from_cache(part, index, padded, projections, run.rows.positions, None)
        heads = run.rows.flatten(heads)[None]
    return part, projections.turned_back(heads, run.positions)


_OWN = {
    "query": ("batch", None, "heads", None), "row": ("batch", None, None), "raw": ("batch", None, None, None, None),
    "index_query": ("batch", None, None, None), "index_weigh": ("batch", None, None),
    "index_raw": ("batch", None, None, None, None),
}  # fmt: skip
"""Logical axes of `Own`."""


def _arrays(own: Own, projections: CompressedAttention) -> tuple[list[jax.Array], list[Any], Any]:
    """What every device needs of the rows and of the parameters: arrays, their axes, and what puts them together."""
    given = {name: x for name, x in own._asdict().items() if x is not None}
    compressors = [projections.compressor, projections.index and projections.index.compressor]
    compressors = [one for one in compressors if one is not None]
    biases = [(one.bias[...], one.norm[...]) for one in compressors]
    arrays = [*given.values(), projections.sinks[...], *(x for pair in biases for x in pair)]
    axes = [*(_OWN[name] for name in given), ("heads",), *((None,) * x.ndim for pair in biases for x in pair)]

    def together(arrays: tuple[jax.Array, ...]) -> tuple[Own, jax.Array, list["_Making"]]:
        rows, sinks, rest = arrays[: len(given)], arrays[len(given)], arrays[len(given) + 1 :]
        making = [_Making(rest[2 * i], rest[2 * i + 1], one.eps) for i, one in enumerate(compressors)]
        return Own(**dict(zip(given, rows, strict=True))), sinks, making

    return arrays, axes, together


class _Making(NamedTuple):
    """Parameters of a compressor: bias [m, s W] of the gates, weight [W] and epsilon of the norm."""

    bias: jax.Array
    norm: jax.Array
    eps: float


def _compressed(
    raw: jax.Array, last: jax.Array, alone: jax.Array, positions: jax.Array, making: _Making, shape: CompressedShape
) -> jax.Array:
    """Compressed rows [B, n, W].

    Args:
      raw: [B, T, 2, s, W] what they are made of.
      last: [B, n] which of the T rows is the last one of each.
      alone: [B, n] whether each is the first of its text: with two series, there are no rows before its own.
      positions: [B, n] of each.
      making: the compressor's.
      shape: of the attention.
    """
    m, s = shape.rate, shape.series
    bias = making.bias.astype(jnp.float32).reshape(m, s, -1)
    values, gates = [], []
    for series in range(s):  # the first of two is of the m rows before
        back = (s - series) * m
        at = jnp.clip(last[..., None] - (back - 1) + jnp.arange(m), 0, raw.shape[1] - 1)  # [B, n, m]
        rows = jnp.take_along_axis(raw[:, :, :, series], at.reshape(len(at), -1)[..., None, None], axis=1)
        value, gate = jnp.moveaxis(rows.reshape(*at.shape, 2, -1), 3, 0)
        gate = gate.astype(jnp.float32) + bias[:, series]
        values.append(value)
        gates.append(jnp.where(alone[..., None, None], -jnp.inf, gate) if series < s - 1 else gate)
    shares = jax.nn.softmax(jnp.concatenate(gates, axis=2), axis=2)
    mean = jnp.sum(shares.astype(raw.dtype) * jnp.concatenate(values, axis=2), axis=2)
    return turned(rms_norm(mean, making.norm, making.eps), positions, shape)


def _from_nothing(
    own: Own, projections: CompressedAttention, positions: jax.Array, starts: jax.Array | None
) -> jax.Array:
    """Heads [B, S, N, H] for whole texts, which may be packed.

    Rows that end a compressed one are m apart or more, across documents too, so there is at most one among every m rows
    of the sequence.
    """
    shape = projections.shape
    arrays, axes, together = _arrays(own, projections)
    starts = jnp.zeros_like(positions) if starts is None else starts

    def here(positions: jax.Array, starts: jax.Array, *arrays: jax.Array) -> tuple[jax.Array]:
        own, sinks, making = together(arrays)
        batch, size = positions.shape
        made = None
        if shape.rate:
            m, count = shape.rate, -(-size // shape.rate)
            ending = (positions + 1) % m == 0
            ending = jnp.pad(ending, ((0, 0), (0, count * m - size))).reshape(batch, count, m)
            last = jnp.arange(count) * m + jnp.argmax(ending, axis=-1)
            after = jnp.take_along_axis(positions, jnp.minimum(last, size - 1), axis=1) + 1
            how = (last, after <= m, after - m)
            rows = [_compressed(raw, *how, one, shape) for raw, one in zip(_raws(own), making, strict=True)]
            made = Made(jnp.where(jnp.any(ending, axis=-1), last, _NEVER), *rows)
        keys = jnp.pad(own.row, ((0, 0), (shape.window - 1, 0), (0, 0)))
        return (attended(own, keys, jnp.zeros((batch,), jnp.int32), starts, made, sinks, shape),)

    inputs = (("batch", None), ("batch", None), *axes)
    return per_device(here, inputs, (_OWN["query"],))(positions, starts, *arrays)[0]


def _raws(own: Own) -> list[jax.Array]:
    return [raw for raw in (own.raw, own.index_raw) if raw is not None]


def _from_cache(
    part: CompressedCache,
    index: jax.Array | int,
    own: Own,
    projections: CompressedAttention,
    first: jax.Array,
    counts: jax.Array | None,
) -> tuple[CompressedCache, jax.Array]:
    """The same for S rows of every request from position first[b] on, of which counts[b] are real; and the cache."""
    shape = projections.shape
    arrays, axes, together = _arrays(own, projections)
    count = len(arrays)
    counts = jnp.full_like(first, own.row.shape[1]) if counts is None else counts

    def here(first: jax.Array, counts: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        own, sinks, making = together(arrays[:count])
        ring, *cached = arrays[count:]
        rows = own.row.astype(ring.dtype)
        keys = jnp.concatenate([before(ring, first, shape.window - 1), rows], axis=1)
        kept = [with_rows(ring, rows, first, counts)]
        made = None
        if shape.rate:
            raws, fresh = zip(cached[::2], cached[1::2], strict=True), []
            for (ring, stored), raw, one in zip(raws, _raws(own), making, strict=True):
                kept += _with_compressed(ring, stored, raw, first, counts, one, shape)
                fresh.append(kept[-1])
            ends = (jnp.arange(fresh[0].shape[1]) + 1) * shape.rate - 1
            made = Made(jnp.broadcast_to(ends, fresh[0].shape[:2]), *fresh)
        low = jnp.zeros(own.row.shape[:2], jnp.int32)
        return (attended(own, keys, first, low, made, sinks, shape), *kept)

    inputs = (("batch",), ("batch",), *axes, *part.axes)
    outputs = (_OWN["query"], *part.axes)
    heads, *kept = per_device(here, inputs, outputs)(first, counts, *arrays, *part.layer(index))
    return part.put(index, kept), heads


def _with_compressed(
    ring: jax.Array,
    stored: jax.Array,
    raw: jax.Array,
    first: jax.Array,
    counts: jax.Array,
    making: _Making,
    shape: CompressedShape,
) -> list[jax.Array]:
    """The ring with the rows `raw` of a pass, and the compressed rows with all those that the pass may complete."""
    m, size, raw = shape.rate, raw.shape[1], raw.astype(ring.dtype)
    back = shape.series * m - 1
    rows = jnp.concatenate([before(ring, first, back), raw], axis=1)
    number = first[:, None] // m + jnp.arange((m - 1 + size) // m)
    last = (number + 1) * m - 1 - first[:, None] + back
    new = _compressed(rows, last, number == 0, number * m, making, shape)
    return [with_rows(ring, raw, first, counts), with_made(stored, new, number)]
