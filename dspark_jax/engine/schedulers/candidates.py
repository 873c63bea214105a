"""The order in which drafts of all requests are admitted: falling survival, then position, then request.

Survival never rises along a request, so the next candidate in that order is known from the drafts already admitted, and
rules that stop in it look no further: the admitted drafts of every request are a prefix of it, and no draft is judged
before it is drawn in. Equal survivals are common (c = 1, requests without history), so the order among them must not
come from anything else.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Drafts that may be admitted, in the order of admission, and what is verified without any of them.

    Attributes:
      survival: [B * G], candidates first.
      request: [B * G].
      eligible: [B * G] bool, the candidates among them.
      floor: [B] drafts that are admitted unconditionally.
      tokens: [] int32, tokens verified at the floor: one per active request and the unconditional drafts.
      expected: [] float32, tokens committed at the floor.
    """

    survival: jax.Array
    request: jax.Array
    eligible: jax.Array
    floor: jax.Array
    tokens: jax.Array
    expected: jax.Array

    @classmethod
    def of(cls, survival: jax.Array, active: jax.Array, minimum: Any, maximum: Any) -> "Candidates":
        """Of survivals [B, G]; see `early_stop` for the other arguments."""
        batch, size = survival.shape
        ceiling = jnp.clip(size if maximum is None else maximum, 0, size)
        ceiling = jnp.where(active, ceiling, 0).astype(jnp.int32)
        floor = jnp.minimum(jnp.clip(minimum, 0, size), ceiling).astype(jnp.int32)
        position = jnp.arange(size)
        eligible = (position >= floor[:, None]) & (position < ceiling[:, None])
        # Positions first: the stable sort then leaves ties in the order (position, request).
        flat = jnp.where(eligible, survival, -1.0).T.reshape(-1)
        # One request's fall already; what is not eligible comes last.
        order = (position + floor[0]) % size if batch == 1 else jnp.argsort(-flat, stable=True)
        sure = jnp.sum(jnp.where(position < floor[:, None], survival, 0.0))
        requests = jnp.sum(active, dtype=jnp.int32)
        tokens = requests + jnp.sum(floor)
        return cls(flat[order], order % batch, eligible.T.reshape(-1)[order], floor, tokens, requests + sure)

    def throughput(self, steps_per_second: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Expected tokens per second at the floor [], and with the first 1, 2, ... candidates [B * G]."""
        expected = self.expected + jnp.cumsum(jnp.where(self.eligible, self.survival, 0.0))
        tokens = self.tokens + 1 + jnp.arange(len(self.survival))
        last = len(steps_per_second) - 1
        rate = steps_per_second[jnp.minimum(tokens, last)]
        return self.expected * steps_per_second[jnp.minimum(self.tokens, last)], expected * rate

    def admit(self, admitted: jax.Array) -> jax.Array:
        """Lengths [B] from a mask [B * G] over the candidates."""
        return self.floor.at[self.request].add((admitted & self.eligible).astype(jnp.int32))


def capacity(
    survival: jax.Array,
    steps_per_second: jax.Array,
    active: jax.Array,
    minimum: jax.Array | int = 0,
    maximum: jax.Array | int | None = None,
    capacities: tuple[int, ...] | None = None,
) -> jax.Array:
    """Tokens to verify, anchors included, for the most expected tokens per second; the fewest of equally good ones.

    This is a global argmax: lossless only over survivals that were known before this round's drafts were drawn.

    Args:
      survival: [B, G] of an earlier round.
      steps_per_second: [N + 1], as in `early_stop`.
      active: [B] bool.
      minimum: [] or [B].
      maximum: [] or [B] or None.
      capacities: rising sizes; the result is rounded up to one of them, and never exceeds the last unless the anchors
        and the unconditional drafts alone do.

    Returns:
      [] int32.
    """
    candidates = Candidates.of(survival, active, minimum, maximum)
    base, rates = candidates.throughput(steps_per_second)
    rates = jnp.where(candidates.eligible, rates, -jnp.inf)
    tokens = candidates.tokens + jnp.argmax(jnp.concatenate([base[None], rates])).astype(jnp.int32)
    if capacities is None:
        return tokens
    rungs = jnp.asarray(capacities, jnp.int32)
    return rungs[jnp.minimum(jnp.searchsorted(rungs, tokens), len(capacities) - 1)]
