"""Drawing tokens inside TPU kernels: the two levels of `ops.sampling.draw`, whose blocks are a kernel's parts of V."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dspark_jax.ops.mosaic import LANES, numbers
from dspark_jax.ops.sampling import FAR, FRACTION_BITS, UNIT, WORD_BITS, Fixed


def draw_part(sums: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, jax.Array, Fixed, Fixed]:
    """Which of the parts with these sums [B, P] the uniforms [B, 2] fall into; P is a multiple of 128.

    Returns:
      [B, 1] each: the part; the scale that turns weights into masses; how far into the part, and the part's mass.
    """
    scale = UNIT / jnp.sum(sums, axis=1, keepdims=True)
    masses = Fixed.of(sums * scale)
    threshold = Fixed(uniforms[:, :1], uniforms[:, 1:] >> (WORD_BITS - FRACTION_BITS))
    zero = jnp.zeros_like(threshold.whole)
    part, rest = _position(masses, threshold, Fixed(zero + UNIT, zero))
    return part, scale, rest, _entry(masses, part)


def draw_inside(weights: jax.Array, scale: jax.Array, rest: Fixed, mass: Fixed) -> jax.Array:
    """The entry [B, 1] of parts' weights [B, N] that is drawn; the other arguments are from `draw_part`."""
    return _position(Fixed.of(weights * scale), rest, mass)[0]


def _entry(masses: Fixed, index: jax.Array) -> Fixed:
    """Entries [B, 1] of [B, N] at index [B, 1]; 0 for -1."""
    chosen = numbers(masses.whole.shape, 1) == index
    return Fixed(*(jnp.sum(jnp.where(chosen, words, 0), axis=1, keepdims=True) for words in masses))


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


def _position(masses: Fixed, threshold: Fixed, total: Fixed) -> tuple[jax.Array, Fixed]:
    """See `ops.sampling._position`; masses are [B, N], everything else [B, 1]."""
    ends = Fixed(*map(running_sums, masses)).carried()
    last = Fixed(*(words[:, -1:] for words in ends))
    threshold = threshold.stretched(total, last)
    found = ends.exceeds(threshold) | ends.equals(last)
    index = jnp.min(jnp.where(found, numbers(found.shape, 1), FAR), axis=1, keepdims=True)
    return index, threshold.minus(_entry(ends, index - 1))
