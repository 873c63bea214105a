"""Drawing tokens inside GPU kernels: the two levels of `ops.sampling.draw`, whose blocks are a kernel's parts of V."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax.ops.sampling import FAR, FRACTION_BITS, GREEDY_BELOW, UNIT, WORD_BITS, Fixed
from dspark_jax.ops.triton import LOG2E, numbers


def exponents(temperature: jax.Array) -> jax.Array:
    """Factor [B] of logits to base 2: exp2((x - max) * factor) is a token's weight; greedy requests use another way."""
    return LOG2E / jnp.where(temperature < GREEDY_BELOW, 1.0, temperature)


def merged(top: jax.Array, total: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(maximum, sums of the parts over it) from maxima and sums [.., P] of parts, each over its own maximum."""
    most = jnp.max(top, axis=-1)
    return most, total * jnp.exp2((top - most[..., None]) * factor[..., None])


def draw_part(sums: jax.Array, uniform: tuple[Any, Any]) -> tuple[jax.Array, jax.Array, Fixed, Fixed]:
    """Which of the parts with these sums [P] a uniform falls into.

    Returns:
      The part; the scale that turns weights into masses; how far into the part, and the part's mass.
    """
    scale = UNIT / jnp.sum(sums)
    masses = Fixed.of(sums * scale)
    threshold = Fixed(uniform[0], uniform[1] >> (WORD_BITS - FRACTION_BITS))
    part, rest = _position(masses, threshold, Fixed(jnp.int32(UNIT), jnp.int32(0)))
    return part, scale, rest, _entry(masses, part)


def draw_inside(weights: jax.Array, scale: jax.Array, rest: Fixed, mass: Fixed) -> jax.Array:
    """The entry of a part's weights [N] that is drawn; the other arguments are from `draw_part`."""
    return _position(Fixed.of(weights * scale), rest, mass)[0]


def _entry(masses: Fixed, index: jax.Array) -> Fixed:
    """Of [N] the one at an index; 0 for -1."""
    chosen = numbers(masses.whole.shape[0]) == index
    return Fixed(*(jnp.sum(jnp.where(chosen, words, 0)) for words in masses))


def _position(masses: Fixed, threshold: Fixed, total: Fixed) -> tuple[jax.Array, Fixed]:
    """See `ops.sampling._position`; masses are [N], everything else scalars."""
    ends = Fixed(*(lax.cumsum(words, axis=0) for words in masses)).carried()
    last = Fixed(*map(jnp.sum, masses)).carried()
    threshold = threshold.stretched(total, last)
    found = ends.exceeds(threshold) | ends.equals(last)
    index = jnp.min(jnp.where(found, numbers(found.shape[0]), FAR))
    return index, threshold.minus(_entry(ends, index - 1))


def whole_spec(*shape: int) -> pl.BlockSpec:
    """A block that is the whole array, for every program."""
    return pl.BlockSpec(shape, lambda *program: (0,) * len(shape))


def one_spec(axis: int) -> Any:
    """One entry of a vector: that of this program's place on a grid axis."""
    return pl.BlockSpec((1,), lambda *program: (program[axis],))
