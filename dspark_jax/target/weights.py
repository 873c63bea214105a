"""Where the parameters of a model are in a checkpoint in the PyTorch layout."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
      pieces: widths of what each head has several of, e.g. query, key and value: the parameter has a head's pieces
        after each other, the tensor the first pieces of all heads, then the second ones.
      filters: stored as the filters of a convolution of single channels, [channels, 1, taps]; taps are the last axis.
      exact: held in float32, whatever the compute type is.
      below: whole numbers from 0 to below this one, held in int32; 0: none, but floating point numbers.
    """

    name: str
    inputs: int = 0
    row: bool = False
    layers: tuple[int, ...] = ()
    whole: bool = False
    flat: bool = False
    experts: int = 0
    pieces: tuple[int, ...] = ()
    filters: bool = False
    exact: bool = False
    below: int = 0

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{i}" in self.name

    def held(self, dtype: Any) -> np.dtype:
        """Type in memory, where the model's compute type is `dtype`."""
        return np.dtype(np.int32 if self.below else np.float32 if self.exact else dtype)

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
        if self.filters:
            return (math.prod(shape[:-1]), 1, shape[-1])
        if self.inputs:
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape

    def load(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Stored tensor -> parameter of one layer, as a view where possible."""
        stored = self._head_by_head(stored) if self.pieces else stored
        return (stored.T if self.inputs else stored).reshape(shape)

    def store(self, value: np.ndarray) -> np.ndarray:
        """Parameter of one layer -> tensor to store."""
        assert not self.pieces, "such a parameter is loaded only"
        shape = self.stored_shape(value.shape)
        return np.ascontiguousarray(value.reshape(shape[::-1]).T if self.inputs else value.reshape(shape))

    def _head_by_head(self, stored: np.ndarray) -> np.ndarray:
        """The tensor with all pieces of a head after each other."""
        heads, rest = len(stored) // sum(self.pieces), stored.shape[1:]
        ends = np.cumsum([heads * width for width in self.pieces])[:-1]
        parts = [part.reshape(heads, -1, *rest) for part in np.split(stored, ends)]
        return np.concatenate(parts, axis=1).reshape(stored.shape)


def with_prefix(prefix: str, weights: Mapping[str, Weight], layers: tuple[int, ...] = ()) -> dict[str, Weight]:
    """The same parameters with `prefix` before their tensors' names, in a stack of these layers."""
    return {path: weight._replace(name=prefix + weight.name, layers=layers) for path, weight in weights.items()}
