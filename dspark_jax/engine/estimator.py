"""How likely drafts are accepted, estimated from what was accepted before: a scheduler's input without a trained head.

Every request keeps a discounted count of the rounds that verified draft k after all before it were accepted, and of
those among them that accepted it. Their quotient is a conditional acceptance; with few rounds it says little, so it is
shrunk to the rate of all requests as if `strength` rounds of the average request had been seen before (the mean of a
beta posterior). A request that has just started is therefore predicted to be average.

A drafter with a confidence head says more: one round with drafts then counts, for every position, as the fractions of
a round that the head expects to reach and to pass it, whether or not the drafts were verified.

The estimate of a round is a function of earlier rounds alone, never of the drafts it decides about, and every round
draws with numbers of its own. Every scheduler that reads it is lossless, even one that maximises globally (paper
appendix A).
"""

import dataclasses

import jax
import jax.numpy as jnp

from dspark_jax.config import InputError
from dspark_jax.engine import arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AcceptanceEstimate:
    """Discounted counts of B request slots with G drafts per round.

    Attributes:
      accepted: [B, G] float32, rounds of the slot's request that accepted drafts 1..k.
      reached: [B, G] float32, rounds that accepted drafts 1..k-1 and verified draft k.
      all_accepted: [G] float32, the same of all requests, earlier ones included.
      all_reached: [G] float32.
      strength: rounds of the average request that count as seen by every request; positive.
      discount: what an observation keeps with each later round of its request, in (0, 1].
      all_discount: what an observation keeps in the rate of all requests with each later round, in (0, 1].
      prior: conditional acceptance assumed for everyone; it weighs one round that never fades.
    """

    accepted: jax.Array
    reached: jax.Array
    all_accepted: jax.Array
    all_reached: jax.Array
    strength: float = dataclasses.field(metadata={"static": True})
    discount: float = dataclasses.field(metadata={"static": True})
    all_discount: float = dataclasses.field(metadata={"static": True})
    prior: float = dataclasses.field(metadata={"static": True})


def empty_estimate(
    batch: int,
    block_size: int,
    *,
    strength: float = 4.0,
    discount: float = 0.98,
    all_discount: float = 0.995,
    prior: float = 0.5,
) -> AcceptanceEstimate:
    """The estimate before any round.

    Args:
      batch: B, number of request slots.
      block_size: G.
      strength: see `AcceptanceEstimate`.
      discount: see `AcceptanceEstimate`.
      all_discount: see `AcceptanceEstimate`.
      prior: see `AcceptanceEstimate`.
    """
    assert strength > 0 and 0 < discount <= 1 and 0 < all_discount <= 1 and 0 < prior < 1
    rows, none = jnp.zeros((batch, block_size), jnp.float32), jnp.zeros(block_size, jnp.float32)
    return AcceptanceEstimate(rows, rows, none, none, strength, discount, all_discount, prior)


@dataclasses.dataclass(frozen=True)
class EstimateSettings:
    """How an `AcceptanceEstimate` learns; see there for the fields. Hashable, so that it can be static under jit."""

    strength: float = 4.0
    discount: float = 0.98
    all_discount: float = 0.995
    prior: float = 0.5
    confident: bool = False
    """Learn from what the drafter's confidence head expects of a round instead of from what was accepted in it."""

    def start(self, batch: int, block_size: int) -> AcceptanceEstimate:
        """The estimate before any round."""
        counts = {name: float(value) for name, value in dataclasses.asdict(self).items() if name != "confident"}
        return empty_estimate(batch, block_size, **counts)

    def check(self) -> None:
        """Refuses settings out of range.

        Raises:
          InputError: which one, and its range.
        """
        for field in dataclasses.fields(self):
            check = arguments.boolean if field.name == "confident" else arguments.real
            check(f"{field.name} of the running estimate", getattr(self, field.name))
        ranges = {
            "strength": (0 < self.strength < float("inf"), "a positive number of rounds"),
            "discount": (0 < self.discount <= 1, "above 0 and at most 1, which forgets nothing"),
            "all_discount": (0 < self.all_discount <= 1, "above 0 and at most 1, which forgets nothing"),
            "prior": (0 < self.prior < 1, "a probability between 0 and 1, both excluded"),
        }
        for name, (holds, remedy) in ranges.items():
            if not holds:
                raise InputError(f"{name}={getattr(self, name)} of the running estimate is out of range; use {remedy}")


def update(
    state: AcceptanceEstimate,
    proposed: jax.Array,
    accepted: jax.Array,
    active: jax.Array,
    expected: jax.Array | None = None,
) -> AcceptanceEstimate:
    """The estimate after one more round.

    Drafts that were not scheduled, or that come after the first rejection, are no observations: a scheduler that
    verifies little learns slowly about later positions, but nothing wrong.

    Args:
      state: before the round.
      proposed: [B] drafts that were verified (those up to an accepted stop token).
      accepted: [B] drafts that were accepted, at most `proposed`.
      active: [B] bool, requests that took part; the rows of the others stay as they are.
      expected: [B, G] survivals that the confidence head gave the round's drafts, which are then learnt instead of
        what came of them.
    """
    depth = jnp.arange(1, state.reached.shape[1] + 1)
    took_part = active[:, None]
    if expected is None:
        reached = took_part & (depth <= jnp.minimum(accepted + 1, proposed)[:, None])
        success = reached & (depth <= accepted[:, None])
    else:
        success = jnp.where(took_part, expected, 0.0)
        reached = jnp.where(took_part, jnp.pad(expected[:, :-1], ((0, 0), (1, 0)), constant_values=1.0), 0.0)
    keep = jnp.where(took_part, state.discount, 1.0)
    keep_all = jnp.where(jnp.any(active), state.all_discount, 1.0)
    return dataclasses.replace(
        state,
        accepted=keep * state.accepted + success,
        reached=keep * state.reached + reached,
        all_accepted=keep_all * state.all_accepted + jnp.sum(success, axis=0),
        all_reached=keep_all * state.all_reached + jnp.sum(reached, axis=0),
    )


def restart(state: AcceptanceEstimate, fresh: jax.Array) -> AcceptanceEstimate:
    """Forgets the requests of the slots in `fresh` [B] bool, which new ones take; the rate of all requests stays."""
    return dataclasses.replace(
        state,
        accepted=jnp.where(fresh[:, None], 0.0, state.accepted),
        reached=jnp.where(fresh[:, None], 0.0, state.reached),
    )


def conditional(state: AcceptanceEstimate) -> jax.Array:
    """[B, G] estimated probability that draft k is accepted given that all before it are."""
    # The prior lasts while counts fade: a position that a scheduler gave up on drifts back and is tried again.
    everyone = (state.all_accepted + state.prior) / (state.all_reached + 1.0)
    return (state.accepted + state.strength * everyone) / (state.reached + state.strength)


def survival(state: AcceptanceEstimate) -> jax.Array:
    """[B, G] estimated probability that drafts 1..k are all accepted; never increases along a request."""
    return jnp.cumprod(conditional(state), axis=1)
