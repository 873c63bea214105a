"""From logits to probabilities to tokens: the one place where both the drafter and the target are sampled.

A draft token is drawn from the very float32 distribution that later scores it; anything else is not lossless.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dspark_jax.ops.filtering import kept

GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy decoding: a one-hot distribution on the first largest logit."""

WORD_BITS = 30
"""Of each of the two words of a uniform."""

UNIT = 1 << WORD_BITS
"""Both words of a uniform are below this."""

FAR = 1 << 30
"""After every index."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, per request; applied alike to drafter and target.

    Logits are divided by the temperature, then cut by top-k, top-p and min-p, each on what the one before has left and
    renormalised (the order of Hugging Face's warpers). A filter that no request uses is None, which costs nothing;
    greedy requests are one-hot distributions among the others.

    Attributes:
      temperature: [B] float32; below 1e-5 is greedy, whatever the filters.
      top_k: [B] int32, 0 is off; or None.
      top_p: [B] float32, 1 is off; or None.
      min_p: [B] float32, 0 is off; or None.
      greedy: static promise that every temperature is 0, which saves all softmax work.
    """

    temperature: jax.Array
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    greedy: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})

    @classmethod
    def constant(cls, temperature: float, batch: int) -> "Sampling":
        """The same temperature for a whole batch, and no filters."""
        return cls(jnp.full((batch,), temperature, jnp.float32), greedy=temperature < GREEDY_BELOW)

    @property
    def filtered(self) -> bool:
        """Whether any filter is in use; static."""
        return not (self.top_k is None and self.top_p is None and self.min_p is None)

    def take(self, rows: Any) -> "Sampling":
        """The settings of some requests, in the order of the indices `rows`."""
        return jax.tree.map(lambda values: values[jnp.asarray(rows)], self)


def first(mask: jax.Array) -> jax.Array:
    """Index [...] of the first True of mask [..., V]; V where there is none (on CPU much faster than an argmax)."""
    size = mask.shape[-1]
    return jnp.min(jnp.where(mask, jnp.arange(size), size), axis=-1)


def largest(logits: jax.Array) -> jax.Array:
    """Index [...] int32 of the first largest of logits [..., V]."""
    top = first(logits == jnp.max(logits, axis=-1, keepdims=True))
    return jnp.minimum(top, logits.shape[-1] - 1).astype(jnp.int32)  # NaN equals nothing


def probabilities(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """softmax(logits / temperature) in float32; one-hot on the argmax where temperature < 1e-5.

    Args:
      logits: [..., V].
      temperature: broadcastable to logits' leading axes.
    """
    weights = _weights(logits, temperature)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _weights(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Probabilities over the likeliest token's: [..., V]; see `probabilities`."""
    logits = logits.astype(jnp.float32)
    temperature = jnp.broadcast_to(temperature, logits.shape[:-1])[..., None]
    soft = _weight(logits, jnp.max(logits, axis=-1, keepdims=True), temperature)
    hard = jax.nn.one_hot(largest(logits), logits.shape[-1], dtype=jnp.float32)
    return jnp.where(temperature < GREEDY_BELOW, hard, soft)


def _weight(logits: jax.Array, top: jax.Array, temperature: jax.Array) -> jax.Array:
    """exp((logits - top) / temperature), by which tokens are drawn and by which they are scored.

    The maximum is subtracted first: logits / temperature has no digits left for differences at low temperatures.
    """
    return jnp.exp((logits - top) * (1.0 / jnp.where(temperature < GREEDY_BELOW, 1.0, temperature)))


def words(uniform: jax.Array) -> jax.Array:
    """A number in [0, 1] as a uniform: float32 [...] -> int32 [..., 2], exact down to 2^-60 and cut off there.

    A uniform u is two words of 30 bits, u = (word 0 + word 1 / 2^30) / 2^30; that is what `draw` and `is_below` take.
    One float32 has 2^23 values, too few for a vocabulary of 150,000 tokens: thousands of them would never be drawn.
    """
    coarse = uniform.astype(jnp.float32) * UNIT
    return jnp.stack([coarse, (coarse - jnp.floor(coarse)) * UNIT], axis=-1).astype(jnp.int32)


def is_below(uniform: jax.Array, probability: jax.Array) -> jax.Array:
    """Whether uniforms [..., 2] are below probabilities [...]: true with that probability, to 2^-60."""
    border = words(probability)
    tied = uniform[..., 0] == border[..., 0]
    return (uniform[..., 0] < border[..., 0]) | (tied & (uniform[..., 1] < border[..., 1]))


class Part(NamedTuple):
    """Where a uniform falls among parts of a distribution, [...] each.

    Attributes:
      index: of the part.
      scale: factor from weights to masses.
      rest: how far into the part.
      mass: of the part.
    """

    index: jax.Array
    scale: jax.Array
    rest: "Fixed"
    mass: "Fixed"


def draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Inverse-CDF sample: the first index whose cumulative weight exceeds u * total.

    Float32 cumulative weights are off by 2^-25 each, which over a vocabulary of 150,000 adds up to a total variation of
    3e-3. So sums are cumulated over blocks first, then inside the block that u falls into, and as fixed-point numbers
    of 50 bits, whose sums are exact. Only the weights and the blocks' sums are rounded, relative to themselves.

    Args:
      weights: [..., V] non-negative, not all zero; need not be normalised.
      uniform: [..., 2] int32, see `words`.

    Returns:
      [...] int32. An index of zero weight is never returned.
    """
    blocks = _blocks(weights.astype(jnp.float32))
    part = draw_part(jnp.sum(blocks, axis=-1), uniform)
    chosen = jnp.take_along_axis(blocks, part.index[..., None, None], axis=-2)[..., 0, :]
    return jnp.minimum(part.index * blocks.shape[-1] + draw_inside(chosen, part), weights.shape[-1] - 1)


def draw_part(sums: jax.Array, uniform: jax.Array) -> Part:
    """The part that is drawn of those with sums [..., P] of weights; P is at most 2047. See `draw`."""
    scale = UNIT / jnp.sum(sums, axis=-1)
    masses = Fixed.of(sums * scale[..., None])
    whole = Fixed(jnp.full_like(uniform[..., 0], UNIT), jnp.zeros_like(uniform[..., 0]))
    index, rest = _position(masses, Fixed(uniform[..., 0], uniform[..., 1] >> WORD_BITS - FRACTION_BITS), whole)
    return Part(index, scale, rest, masses.at(index))


def draw_inside(weights: jax.Array, part: Part) -> jax.Array:
    """Index [...] that is drawn within a part of weights [..., N], at most 2047 of them."""
    return _position(Fixed.of(weights * part.scale[..., None]), part.rest, part.mass)[0]


def _blocks(weights: jax.Array) -> jax.Array:
    """Weights [..., V] as [..., blocks, tokens per block], the last one filled up with zeros."""
    lead, size = weights.shape[:-1], 1 << math.ceil(math.log2(weights.shape[-1]) / 2)
    pad = [(0, 0)] * len(lead) + [(0, -weights.shape[-1] % size)]
    return jnp.pad(weights, pad).reshape(*lead, -1, size)


FRACTION_BITS = 20
"""Of a fraction; the sum of up to 2047 of them fits into an int32."""


class Fixed(NamedTuple):
    """Fixed-point numbers `whole + part / 2^20`, int32 each; 0 <= part < 2^20 but in masses that are to be summed."""

    whole: jax.Array
    part: jax.Array

    @classmethod
    def of(cls, values: jax.Array) -> "Fixed":
        """Of float32 values >= 0, rounded up, so that nothing positive becomes zero."""
        whole = jnp.floor(values)
        return cls(whole.astype(jnp.int32), jnp.ceil((values - whole) * (1 << FRACTION_BITS)).astype(jnp.int32))

    def carried(self) -> "Fixed":
        """The same numbers with 0 <= part < 2^20."""
        return Fixed(self.whole + (self.part >> FRACTION_BITS), self.part & (1 << FRACTION_BITS) - 1)

    def exceeds(self, other: "Fixed") -> jax.Array:
        """Where it is the larger one; both carried."""
        return (self.whole > other.whole) | ((self.whole == other.whole) & (self.part > other.part))

    def equals(self, other: "Fixed") -> jax.Array:
        """Where both are the same; both carried."""
        return (self.whole == other.whole) & (self.part == other.part)

    def minus(self, other: "Fixed") -> "Fixed":
        """The difference, carried."""
        return Fixed(self.whole - other.whole, self.part - other.part).carried()

    def stretched(self, total: "Fixed", last: "Fixed") -> "Fixed":
        """A threshold below `total` as one below `last`: masses that are rounded have another sum than their own."""
        missing = Fixed(last.whole - total.whole, last.part - total.part).float()
        stretch = self.float() * (missing / total.float())
        whole = jnp.floor(stretch)
        part = ((stretch - whole) * (1 << FRACTION_BITS)).astype(jnp.int32)
        return Fixed(self.whole + whole.astype(jnp.int32), self.part + part).carried()

    def at(self, index: jax.Array) -> "Fixed":
        """Entries [...] at index [...] of [..., N]."""
        return Fixed(*(jnp.take_along_axis(words, index[..., None], axis=-1)[..., 0] for words in self))

    def float(self) -> jax.Array:
        """Rounded to float32."""
        return self.whole.astype(jnp.float32) + self.part.astype(jnp.float32) * 2.0**-FRACTION_BITS


def _position(masses: Fixed, threshold: Fixed, total: Fixed) -> tuple[jax.Array, Fixed]:
    """The entry [...] of masses [..., N] into which threshold [...] < total falls, and how far into it.

    The masses' own sum is not quite `total`, since they are rounded; the threshold is stretched accordingly.
    """
    ends = Fixed(*(jnp.cumsum(words, axis=-1) for words in masses)).carried()
    last = Fixed(*(words[..., -1] for words in ends))
    threshold = threshold.stretched(total, last)
    limit, whole = (Fixed(*(words[..., None] for words in one)) for one in (threshold, last))
    # The last positive entry is the first that reaches the sum; it also takes what rounding puts after it.
    index = first(ends.exceeds(limit) | ends.equals(whole))
    before = Fixed(*(jnp.where(index > 0, words, 0) for words in ends.at(jnp.maximum(index - 1, 0))))
    return index, threshold.minus(before)


def allowed(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, ..., V] in float32, minus infinity where a filter of the request removes the token."""
    logits = logits.astype(jnp.float32)
    if not sampling.filtered:
        return logits
    temperature = jnp.where(sampling.temperature < GREEDY_BELOW, 1.0, sampling.temperature)
    settings = [per_row(values, logits) for values in (temperature, sampling.top_k, sampling.top_p, sampling.min_p)]
    return jnp.where(kept(logits, *settings), logits, -jnp.inf)


def per_row(values: Any, logits: jax.Array) -> Any:
    """Settings [B] (or None) broadcast over the leading axes of logits [B, ..., V]."""
    if values is None:
        return None
    return jnp.broadcast_to(values.reshape(-1, *[1] * (logits.ndim - 2)), logits.shape[:-1])


def distribution(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """What tokens are drawn from and scored by: [B, ..., V] float32, temperature and filters applied."""
    return probabilities(allowed(logits, sampling), per_row(sampling.temperature, logits))


def token_probabilities(logits: jax.Array, tokens: jax.Array, sampling: Sampling) -> jax.Array:
    """`distribution(logits, sampling)[tokens]` without the array of all probabilities.

    Args:
      logits: [B, T, V].
      tokens: [B, T].
      sampling: of the B requests.

    Returns:
      [B, T] float32; 0 for a token that a filter removes.
    """
    logits = allowed(logits, sampling)
    temperature = sampling.temperature[:, None]
    top = jnp.max(logits, axis=-1)
    total = jnp.sum(_weight(logits, top[..., None], temperature[..., None]), axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    soft = _weight(chosen, top, temperature) / total
    return jnp.where(temperature < GREEDY_BELOW, (largest(logits) == tokens).astype(jnp.float32), soft)


def sample(logits: jax.Array, sampling: Sampling, uniform: jax.Array) -> jax.Array:
    """Tokens [B] drawn from logits [B, V] with one uniform [B, 2] each."""
    if sampling.greedy:
        return largest(logits)
    return draw(_weights(allowed(logits, sampling), sampling.temperature), uniform)
