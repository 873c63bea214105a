"""Metrics as (numerator, denominator): summed over micro-steps, steps and devices, divided once at the end."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratio:
    """A mean in the making.

    Attributes:
      num: weighted sum of the observations.
      den: sum of the weights.
    """

    num: Any
    den: Any

    def __add__(self, other: "Ratio") -> "Ratio":
        """The ratio over both sets of observations."""
        return Ratio(self.num + other.num, self.den + other.den)

    def value(self) -> float:
        """num / den as a host float; NaN when nothing was observed (den = 0). Waits for the device."""
        num, den = float(np.asarray(self.num)), float(np.asarray(self.den))
        return num / den if den else math.nan


def merge(left: Mapping[str, Ratio], right: Mapping[str, Ratio]) -> dict[str, Ratio]:
    """Sums two sets of metrics; a name that only one of them has keeps its ratio. Works inside jit."""
    merged = dict(left)
    for name, ratio in right.items():
        merged[name] = merged[name] + ratio if name in merged else ratio
    return merged


def values(metrics: Mapping[str, Ratio]) -> dict[str, float]:
    """Host floats by name, in one transfer; a metric without an observation has no value and is left out."""
    fetched: dict[str, Ratio] = jax.device_get(dict(metrics))
    return {name: ratio.value() for name, ratio in fetched.items() if np.asarray(ratio.den) != 0}
