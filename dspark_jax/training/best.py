"""Which checkpoint is meant: the newest one, one by its step, or the best one by accepted length on held-out prompts.

A run that measures itself (`train.evaluate_every`) notes in a checkpoint what it has found there. Orbax keeps the best
of them beside the newest ones.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from dspark_jax.errors import InputError

NEWEST, BEST = "newest", "best"
"""What `--checkpoint` takes besides a step."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a checkpoint says of itself on held-out prompts.

    Attributes:
      tau: accepted length per round, mean over the prompt sets.
      asked: hash of what was asked and how; only equal ones can be compared.
    """

    tau: float
    asked: str

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> "HeldOut | None":
        """As it is in a checkpoint; None where nothing was measured."""
        found = about.get("heldout")
        return cls(**found) if found else None


def best_step(measured: Mapping[int, HeldOut]) -> int | None:
    """The step of the highest tau, the later one of two; None if nothing was measured.

    Where a run has been continued with other held-out prompts or settings, what was measured before does not count.
    """
    if not measured:
        return None
    asked = measured[max(measured)].asked
    comparable = {step: one.tau for step, one in measured.items() if one.asked == asked}
    return max(comparable, key=lambda step: (comparable[step], step), default=None)


class KeepBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the best checkpoint of those that are there."""

    def __init__(self, measured: Mapping[int, HeldOut]):
        """`measured` by step; it may grow."""
        self.measured = measured

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each of `checkpoints` is kept."""
        del context
        there = {info.step: self.measured[info.step] for info in checkpoints if info.step in self.measured}
        best = best_step(there)
        return [info.step == best for info in checkpoints]


def check_name(name: str) -> None:
    """Refuses what names no checkpoint.

    Raises:
      InputError: it is neither newest, best nor a step.
    """
    if name not in (NEWEST, BEST) and not (name.isascii() and name.isdecimal()):
        raise InputError(f"--checkpoint={name}: names no checkpoint; use {NEWEST}, {BEST} or a step, e.g. 500")


def named_step(name: str, directory: Path, steps: Sequence[int], measured: Mapping[int, HeldOut]) -> int:
    """The step of the checkpoint that `best` or a number names.

    Args:
      name: checked by `check_name`, and not `newest`.
      directory: of the checkpoints.
      steps: that are there.
      measured: what they say of themselves.

    Raises:
      InputError: there is none.
    """
    if name != BEST:
        if int(name) not in steps:
            there = ", ".join(map(str, sorted(steps)))
            raise InputError(f"--checkpoint={name}: {directory} has no such step, but {there}; use one of them")
        return int(name)
    best = best_step(measured)
    if best is None:
        raise InputError(
            f"--checkpoint={BEST}: none of {directory} was measured on held-out prompts (train.evaluate_every); "
            f"use {NEWEST} or a step"
        )
    return best
