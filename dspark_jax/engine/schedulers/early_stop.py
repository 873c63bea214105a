"""The paper's Algorithm 1: drafts are admitted while expected tokens per second rise."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedulers import checks
from dspark_jax.engine.schedulers.base import Measured, Scheduler, bounds_of, floats
from dspark_jax.engine.schedulers.candidates import Candidates
from dspark_jax.engine.schedulers.survival import survival


def admitted_until_stop(
    survivals: jax.Array,
    steps_per_second: jax.Array,
    active: jax.Array,
    minimum: jax.Array | int = 0,
    maximum: jax.Array | int | None = None,
) -> jax.Array:
    """The paper's Algorithm 1: admits drafts by falling survival while expected tokens per second rise.

    It stops at the first draft that does not raise them, even if later ones would: that is what keeps it lossless.

    Args:
      survivals: [B, G] float32 of this round's drafts.
      steps_per_second: [N + 1], entry n = engine steps per second with n tokens in the verified batch, anchors
        included; beyond N it is entry N.
      active: [B] bool; other requests get 0 and cost nothing.
      minimum: [] or [B] drafts that are admitted unconditionally, before all others; at most `maximum` of them.
      maximum: [] or [B] drafts beyond which a request has no candidates; None is G.

    Returns:
      lengths [B] int32 in 0..G.
    """
    candidates = Candidates.of(survivals, active, minimum, maximum)
    base, rates = candidates.throughput(steps_per_second)
    # Up to the stop every rate was a new best, so the best so far is the one before.
    improving = (rates > jnp.concatenate([base[None], rates[:-1]])) & candidates.eligible
    return candidates.admit(jnp.cumprod(improving.astype(jnp.int32)).astype(bool))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStop(Scheduler):
    """Algorithm 1 over a cost table, with live confidences.

    Attributes:
      steps_per_second: [N + 1] engine steps per second by verified tokens.
    """

    name: ClassVar[str] = "early_stop"
    needed: ClassVar[tuple[str, ...]] = ("steps_per_second",)
    steps_per_second: jax.Array | None = None

    def admit(self, proposal: Proposal, active: jax.Array, history: Any) -> tuple[jax.Array, Any]:
        """Drafts of all requests by falling survival."""
        assert self.steps_per_second is not None
        live = survival(self.logits(proposal, history))
        return admitted_until_stop(live, self.steps_per_second, active, self.minimum, self.maximum), history

    @classmethod
    def from_run(cls, measured: Measured) -> Scheduler:
        """With the run's costs and calibration."""
        return early_stop(measured.steps_per_second, **measured.calibration)

    def check(self, models: Models, requests: int) -> None:
        """As `Scheduler.check`, and the cost table."""
        super().check(models, requests)
        checks.check_rates(self, "steps_per_second")


def early_stop(steps_per_second: Any, **bounds: Any) -> EarlyStop:
    """Algorithm 1 over a cost table [N + 1]; `bounds` are attributes of `Scheduler`."""
    table = floats("steps_per_second", steps_per_second)
    return EarlyStop(steps_per_second=table, **bounds_of("early_stop", bounds))
