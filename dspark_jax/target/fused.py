"""Experts that a checkpoint stores as one tensor per layer, as tensors of single experts: each is a part of the file.

So a mixture is loaded the same from files that have a tensor for every expert and from those that have not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dspark_jax.errors import InputError
from dspark_jax.target.dequantise import Matrix
from dspark_jax.target.families.family import Fused


def with_experts(tensors: Mapping[str, Any], fused: Mapping[str, Fused], where: str) -> dict[str, Any]:
    """The tensors of a checkpoint with those of experts one by one.

    Args:
      tensors: by name.
      fused: how the names of such tensors end -> how they are stored.
      where: the directory, for messages.

    Raises:
      InputError: such a tensor has a shape that does not divide into its parts, or an expert is there on its own, too.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(tuple(fused))}
    for name in tensors.keys() - found.keys():
        how = next(how for end, how in fused.items() if name.endswith(end))
        for part, tensor in _parts(name, tensors[name], how, where):
            if part in found:
                raise InputError(
                    f"{where}: tensor {name} has all experts of a layer, and {part} is one of them; keep one of the two"
                )
            found[part] = tensor
    return found


def _parts(name: str, tensor: Any, how: Fused, where: str) -> Iterator[tuple[str, Any]]:
    """Names and tensors of the experts in one tensor, as linear layers have them."""
    turned = how.turned and not isinstance(tensor, Matrix)  # a quantised matrix has its outputs first
    count, kinds = tensor.shape[0], len(how.parts)
    rows = tensor.shape[-1 if turned or how.bias else 1] if tensor.ndim > 1 else 0
    if tensor.ndim != (2 if how.bias else 3) or rows % kinds:
        raise InputError(
            f"{where}: tensor {name} has shape {tensor.shape}, which is not {' and '.join(how.parts)} of every expert; "
            "config.json and weights are not of the same model"
        )
    base = name[: name.rindex(".")]
    for expert in range(count):
        for number, part in enumerate(how.parts):
            own = slice(number, rows, kinds) if how.alternating else _piece(number, rows // kinds)
            title = f"{base}.{expert}.{part}{'.bias' if how.bias else '.weight'}"
            yield title, _cut(tensor, expert, own, rows, turned=turned)


def _piece(number: int, size: int) -> slice:
    return slice(number * size, (number + 1) * size)


def _cut(tensor: Any, expert: int, own: slice, rows: int, *, turned: bool) -> Any:
    """Some of an expert's `rows` outputs."""
    if isinstance(tensor, Matrix):
        return tensor.rows(slice(expert * rows + own.start, expert * rows + own.stop, own.step))
    one: np.ndarray = tensor[expert]
    return one[:, own].T if turned else one[own]
