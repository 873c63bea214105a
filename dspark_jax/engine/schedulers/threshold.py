"""The scheduler that cuts a block before the first draft of low confidence (paper 3.2, trap 28)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedulers import checks
from dspark_jax.engine.schedulers.base import Measured, Scheduler, bounds_of, floats


def kept_drafts(confidence: jax.Array, minimum: jax.Array | float) -> jax.Array:
    """Keeps the drafts before the first one whose confidence is below `minimum` (trap 28).

    Args:
      confidence: [B, G] logits; draft k is kept while sigmoid(c_1), ..., sigmoid(c_k) >= minimum.
      minimum: in [0, 1]; 0 keeps everything.

    Returns:
      lengths [B] in 0..G; 0 verifies the anchor alone.
    """
    kept = jax.nn.sigmoid(confidence.astype(jnp.float32)) >= minimum
    return jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=1), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold(Scheduler):
    """Verifies the drafts before the first one below `confidence` [], a probability."""

    name: ClassVar[str] = "threshold"
    needed: ClassVar[tuple[str, ...]] = ("confidence",)
    confidence: jax.Array | None = None

    def admit(self, proposal: Proposal, active: jax.Array, history: Any) -> tuple[jax.Array, Any]:
        """A prefix of every request, by its own confidences alone."""
        assert self.confidence is not None
        lengths = kept_drafts(self.logits(proposal, history), self.confidence)
        return self.within(lengths, active, proposal.tokens.shape[1]), history

    @classmethod
    def from_run(cls, measured: Measured) -> Scheduler:
        """With the run's calibration."""
        return threshold(measured.confidence, **measured.calibration)

    def check(self, models: Models, requests: int) -> None:
        """As `Scheduler.check`; the threshold is a probability."""
        super().check(models, requests)
        checks.check_probability(self, "confidence")


def threshold(confidence: Any, **bounds: Any) -> Threshold:
    """Verifies the drafts before the first one below `confidence` []; `bounds` are attributes of `Scheduler`."""
    return Threshold(confidence=floats("confidence", confidence), **bounds_of("threshold", bounds))
