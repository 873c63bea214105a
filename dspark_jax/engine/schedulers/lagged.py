"""The paper's production variant: a batch size from confidences two rounds old, filled with the best drafts of now."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedulers import checks
from dspark_jax.engine.schedulers.base import History, Measured, Scheduler, bounds_of, floats
from dspark_jax.engine.schedulers.candidates import Candidates, capacity
from dspark_jax.engine.schedulers.survival import survival


def admitted_by_capacity(
    live: jax.Array,
    old: jax.Array,
    steps_per_second: jax.Array,
    active: jax.Array,
    minimum: jax.Array | int = 0,
    maximum: jax.Array | int | None = None,
    capacities: tuple[int, ...] | None = None,
) -> jax.Array:
    """Production variant: the batch size from confidences two rounds old, filled with the best drafts of now.

    Two rounds, because the size must be known before the round that precedes it has ended. The old survivals decide
    one number, and they decide it before this round's drafts are drawn, so any values do no harm to the output
    distribution: stale ones, those of a request that has been replaced, or a prior for a request without history. A
    bad prior costs speed, never losslessness.

    Args:
      live: [B, G] survivals of this round's drafts.
      old: [B, G] survivals two rounds old.
      steps_per_second: [N + 1], as in `early_stop`.
      active: [B] bool.
      minimum: [] or [B] drafts that are admitted unconditionally.
      maximum: [] or [B], or None for G.
      capacities: sizes that the batch is rounded up to, as in `capacity`; the room is filled.

    Returns:
      lengths [B] int32 in 0..G. Their sum and the active requests never exceed the capacity, but for `minimum`.
    """
    room = capacity(old, steps_per_second, active, minimum, maximum, capacities)
    candidates = Candidates.of(live, active, minimum, maximum)
    return candidates.admit(jnp.arange(live.size) < room - candidates.tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lagged(Scheduler):
    """A capacity by global argmax over old survivals, admission by live ones.

    Attributes:
      steps_per_second: [N + 1] engine steps per second by verified tokens.
      prior: [G] survivals assumed for a request's first two rounds; it might be the mean survival so far.
      capacities: batch sizes that are filled; None is any. Static.
    """

    name: ClassVar[str] = "lagged"
    needed: ClassVar[tuple[str, ...]] = ("steps_per_second", "prior")
    steps_per_second: jax.Array | None = None
    prior: jax.Array | None = None
    capacities: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def remembers(self) -> bool:
        """Survivals of two rounds."""
        return True

    def filling(self, sizes: tuple[int, ...]) -> Self:
        """Fills the size that it would leave room in."""
        return self if self.capacities is not None else dataclasses.replace(self, capacities=sizes)

    def start(self, batch: int, block_size: int) -> History:
        """The prior, for two rounds."""
        assert self.prior is not None
        estimate = None if self.online is None else self.online.start(batch, block_size)
        return History(jnp.broadcast_to(self.prior, (2, batch, block_size)), estimate)

    def admit(self, proposal: Proposal, active: jax.Array, history: History) -> tuple[jax.Array, History]:
        """As many drafts as pay by what was known two rounds ago."""
        assert self.steps_per_second is not None and history.survival is not None
        live, bounds = survival(self.logits(proposal, history)), (active, self.minimum, self.maximum)
        lengths = admitted_by_capacity(live, history.survival[1], self.steps_per_second, *bounds, self.capacities)
        return lengths, dataclasses.replace(history, survival=jnp.stack([live, history.survival[0]]))

    @classmethod
    def from_run(cls, measured: Measured) -> Scheduler:
        """With the run's costs and calibration; every draft is assumed to be accepted in four of five rounds."""
        prior = 0.8 ** np.arange(1, measured.block_size + 1)
        return lagged(measured.steps_per_second, prior, **measured.calibration)

    def check(self, models: Models, requests: int) -> None:
        """As `Scheduler.check`, and cost table, prior and capacities."""
        super().check(models, requests)
        checks.check_rates(self, "steps_per_second")
        checks.check_capacities(self)
        checks.check_prior(self, models.block_size)


def lagged(steps_per_second: Any, prior: Any, **bounds: Any) -> Lagged:
    """The production variant; see `Lagged`. `bounds` are attributes of `Scheduler`, and `capacities`."""
    return Lagged(
        steps_per_second=floats("steps_per_second", steps_per_second),
        prior=floats("prior", prior),
        **bounds_of("lagged", bounds, capacities=True),
    )
