"""Drawing tokens inside TPU kernels: the two levels of `ops.sampling.draw`, whose blocks are a kernel's parts of V."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dspark_jax.ops.mosaic import LANES, numbers
from dspark_jax.ops.sampling import FRACTION_BITS, UNIT, WORD_BITS

FAR = 1 << 30
"""After every index."""

_Number = tuple[jax.Array, jax.Array]  # whole and fraction of a fixed-point number, int32; see `ops.sampling`


def draw_part(sums: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, jax.Array, _Number, _Number]:
    """Which of the parts with these sums [B, P] the uniforms [B, 2] fall into; P is a multiple of 128.

    Returns:
      [B, 1] each: the part; the scale that turns weights into masses; how far into the part, and the part's mass.
    """
    scale = UNIT / jnp.sum(sums, axis=1, keepdims=True)
    masses = _fixed(sums * scale)
    threshold = uniforms[:, :1], uniforms[:, 1:] >> (WORD_BITS - FRACTION_BITS)
    zero = jnp.zeros_like(threshold[0])
    part, rest = _position(masses, threshold, (zero + UNIT, zero))
    return part, scale, rest, (_at(masses[0], part), _at(masses[1], part))


def draw_inside(weights: jax.Array, scale: jax.Array, rest: _Number, mass: _Number) -> jax.Array:
    """The entry [B, 1] of parts' weights [B, N] that is drawn; the other arguments are from `draw_part`."""
    return _position(_fixed(weights * scale), rest, mass)[0]


def _fixed(values: jax.Array) -> _Number:
    whole = jnp.floor(values)
    return whole.astype(jnp.int32), jnp.ceil((values - whole) * (1 << FRACTION_BITS)).astype(jnp.int32)


def _carried(number: _Number) -> _Number:
    return number[0] + (number[1] >> FRACTION_BITS), number[1] & ((1 << FRACTION_BITS) - 1)


def _float(number: _Number) -> jax.Array:
    return number[0].astype(jnp.float32) + number[1].astype(jnp.float32) * 2.0**-FRACTION_BITS


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """Entries [B, 1] of [B, N] at index [B, 1]; 0 for -1."""
    return jnp.sum(jnp.where(numbers(values.shape, 1) == index, values, 0), axis=1, keepdims=True)


def running_sums(values: jax.Array) -> jax.Array:
    """Inclusive sums of int32 [B, N] along the lanes; N is a multiple of 128. A TPU has no cumulative sum."""
    registers: list[jax.Array] = []
    lane = numbers((values.shape[0], LANES), 1)
    before: Any = 0
    for start in range(0, values.shape[1], LANES):
        ends = values[:, start : start + LANES]
        step = 1
        while step < LANES:
            ends += jnp.where(lane >= step, pltpu.roll(ends, step, 1), 0)
            step *= 2
        registers.append(ends + before)
        before = registers[-1][:, LANES - 1 :]
    return jnp.concatenate(registers, axis=1)


def _position(masses: _Number, threshold: _Number, total: _Number) -> tuple[jax.Array, _Number]:
    """See `ops.sampling._position`; masses are [B, N], everything else [B, 1]."""
    ends = _carried((running_sums(masses[0]), running_sums(masses[1])))
    last = ends[0][:, -1:], ends[1][:, -1:]
    stretch = _float(threshold) * (_float((last[0] - total[0], last[1] - total[1])) / _float(total))
    whole = jnp.floor(stretch)
    part = ((stretch - whole) * (1 << FRACTION_BITS)).astype(jnp.int32)
    limit = _carried((threshold[0] + whole.astype(jnp.int32), threshold[1] + part))
    beyond = (ends[0] > limit[0]) | ((ends[0] == limit[0]) & (ends[1] > limit[1]))
    final = (ends[0] == last[0]) & (ends[1] == last[1])
    index = jnp.min(jnp.where(beyond | final, numbers(ends[0].shape, 1), FAR), axis=1, keepdims=True)
    return index, _carried((limit[0] - _at(ends[0], index - 1), limit[1] - _at(ends[1], index - 1)))
