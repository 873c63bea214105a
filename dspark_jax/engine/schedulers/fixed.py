"""The scheduler that verifies every draft, or the same number in every round."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine import arguments
from dspark_jax.engine.schedulers.base import Measured, Scheduler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(Scheduler):
    """Verifies the first `maximum` drafts, or all."""

    name: ClassVar[str] = "fixed"
    reads_confidence: ClassVar[bool] = False

    @property
    def selects(self) -> bool:
        """Only where there is a maximum."""
        return self.maximum is not None

    def admit(self, proposal: Proposal, active: jax.Array, history: Any) -> tuple[jax.Array, Any]:
        """Every draft within the bounds."""
        batch, size = proposal.tokens.shape
        return self.within(jnp.full(batch, size, jnp.int32), active, size), history

    @classmethod
    def from_run(cls, measured: Measured) -> Scheduler:
        """All drafts."""
        del measured
        return fixed()


def fixed(length: Any = None) -> Fixed:
    """Verifies the first `length` drafts ([] or [B]), by default all."""
    return Fixed(maximum=None if length is None else arguments.array("length", length, jnp.int32))
