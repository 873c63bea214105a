"""Where the parameters of a model are in a checkpoint in the PyTorch layout."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Weight(NamedTuple):
    """Where a parameter is in a checkpoint in the PyTorch layout.

    Attributes:
      name: tensor name; `{i}` runs over layers and makes the parameter a stack.
      inputs: how many leading axes of the parameter are inputs of a linear layer, which is stored as [out, in];
        0 = stored as it is, up to merged axes.
      whole: stored with all its axes.
      experts: how many experts are on the second axis; `{e}` runs over them, and each has a tensor of its own.
      flat: stored with all its axes merged, as the bias of a linear layer.
      row: a vector that is stored as a linear layer with one output, [1, in].
      layers: the layers that a stack holds, where those are not 0, 1, 2, ...
    """

    name: str
    inputs: int = 0
    row: bool = False
    layers: tuple[int, ...] = ()
    whole: bool = False
    flat: bool = False
    experts: int = 0

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{i}" in self.name

    def names(self, layers: int) -> list[str]:
        """Tensor names, one per layer for a stack of so many, or one per expert of each layer."""
        rows = self.layers or range(layers) if self.stacked else (0,)
        return [self.name.format(i=i, e=e) for i in rows for e in range(self.experts or 1)]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor of one layer whose parameter has `shape`."""
        if self.row:
            return (1, *shape)
        if self.whole:
            return shape
        if self.flat:
            return (math.prod(shape),)
        if self.inputs:
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape

    def load(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Stored tensor -> parameter of one layer, as a view where possible."""
        return (stored.T if self.inputs else stored).reshape(shape)

    def store(self, value: np.ndarray) -> np.ndarray:
        """Parameter of one layer -> tensor to store."""
        shape = self.stored_shape(value.shape)
        return np.ascontiguousarray(value.reshape(shape[::-1]).T if self.inputs else value.reshape(shape))


def with_prefix(prefix: str, weights: Mapping[str, Weight], layers: tuple[int, ...] = ()) -> dict[str, Weight]:
    """The same parameters with `prefix` before their tensors' names, in a stack of these layers."""
    return {path: weight._replace(name=prefix + weight.name, layers=layers) for path, weight in weights.items()}
