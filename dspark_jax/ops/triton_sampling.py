"""Drawing tokens inside GPU kernels: the two levels of `ops.sampling.draw`, whose blocks are a kernel's parts of V."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax.ops.sampling import FRACTION_BITS, GREEDY_BELOW, UNIT, WORD_BITS
from dspark_jax.ops.triton import LOG2E, numbers

FAR = 1 << 30  # after every index

_Number = tuple[jax.Array, jax.Array]  # whole and fraction of a fixed-point number, int32; see `ops.sampling`


def exponents(temperature: jax.Array) -> jax.Array:
    """Factor [B] of logits to base 2: exp2((x - max) * factor) is a token's weight; greedy requests use another way."""
    return LOG2E / jnp.where(temperature < GREEDY_BELOW, 1.0, temperature)


def merged(top: jax.Array, total: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(maximum, sums of the parts over it) from maxima and sums [.., P] of parts, each over its own maximum."""
    most = jnp.max(top, axis=-1)
    return most, total * jnp.exp2((top - most[..., None]) * factor[..., None])


def draw_part(sums: jax.Array, uniform: _Number) -> tuple[jax.Array, jax.Array, _Number, _Number]:
    """Which of the parts with these sums [P] a uniform falls into.

    Returns:
      The part; the scale that turns weights into masses; how far into the part, and the part's mass.
    """
    scale = UNIT / jnp.sum(sums)
    masses = _fixed(sums * scale)
    threshold = uniform[0], uniform[1] >> (WORD_BITS - FRACTION_BITS)
    part, rest = _position(masses, threshold, (jnp.int32(UNIT), jnp.int32(0)))
    return part, scale, rest, (_at(masses[0], part), _at(masses[1], part))


def draw_inside(weights: jax.Array, scale: jax.Array, rest: _Number, mass: _Number) -> jax.Array:
    """The entry of a part's weights [N] that is drawn; the other arguments are from `draw_part`."""
    return _position(_fixed(weights * scale), rest, mass)[0]


def _fixed(values: jax.Array) -> _Number:
    whole = jnp.floor(values)
    return whole.astype(jnp.int32), jnp.ceil((values - whole) * (1 << FRACTION_BITS)).astype(jnp.int32)


def _carried(number: _Number) -> _Number:
    return number[0] + (number[1] >> FRACTION_BITS), number[1] & ((1 << FRACTION_BITS) - 1)


def _float(number: _Number) -> jax.Array:
    return number[0].astype(jnp.float32) + number[1].astype(jnp.float32) * 2.0**-FRACTION_BITS


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[index]; 0 for -1."""
    return jnp.sum(jnp.where(numbers(values.shape[0]) == index, values, 0))


def _position(masses: _Number, threshold: _Number, total: _Number) -> tuple[jax.Array, _Number]:
    """See `ops.sampling._position`; masses are [N], everything else scalars."""
    ends = _carried((lax.cumsum(masses[0], axis=0), lax.cumsum(masses[1], axis=0)))
    last = _carried((jnp.sum(masses[0]), jnp.sum(masses[1])))
    stretch = _float(threshold) * (_float((last[0] - total[0], last[1] - total[1])) / _float(total))
    whole = jnp.floor(stretch)
    part = ((stretch - whole) * (1 << FRACTION_BITS)).astype(jnp.int32)
    limit = _carried((threshold[0] + whole.astype(jnp.int32), threshold[1] + part))
    beyond = (ends[0] > limit[0]) | ((ends[0] == limit[0]) & (ends[1] > limit[1]))
    final = (ends[0] == last[0]) & (ends[1] == last[1])
    index = jnp.min(jnp.where(beyond | final, numbers(ends[0].shape[0]), FAR))
    return index, _carried((limit[0] - _at(ends[0], index - 1), limit[1] - _at(ends[1], index - 1)))


def whole_spec(*shape: int) -> pl.BlockSpec:
    """A block that is the whole array, for every program."""
    return pl.BlockSpec(shape, lambda *program: (0,) * len(shape))


def one_spec(axis: int) -> Any:
    """One entry of a vector: that of this program's place on a grid axis."""
    return pl.BlockSpec((1,), lambda *program: (program[axis],))
