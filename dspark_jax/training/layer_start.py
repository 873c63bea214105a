"""Draft layers that begin as the target's last ones (`drafter.init_layers`), beyond the paper.

A draft layer is one of the target that reads the context too. Begun as the target's last layers, with a context that is
what these layers read, it attends as they do from the first step on.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.config import DrafterConfig, InputError
from dspark_jax.target.model import Target
from dspark_jax.training.state import Params, TrainState, to_params

TARGET = "target"
"""The value of `drafter.init_layers` that asks for it."""

_LAYERS = "backbone.layers."
_PARTS = {
    "attention": ("attention", "attention_norm", "attention_out_norm"),
    "MLP": ("mlp", "mlp_norm", "mlp_out_norm"),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """How the draft layers begin.

    Attributes:
      layers: of the target, one for each draft layer.
      taken: parts of them that the draft layers begin as.
      new: parts that are random, since the target's have other shapes.
    """

    layers: tuple[int, ...]
    taken: tuple[str, ...]
    new: tuple[str, ...]

    def line(self) -> str:
        """What a user should know."""
        new = f"; {' and '.join(self.new)} random, the target's have other shapes" if self.new else ""
        return f"draft layers begin as {' and '.join(self.taken)} of the target's layers {list(self.layers)}{new}"


def plan_layers(target: Target, wanted: Params, config: DrafterConfig) -> Start:
    """Which layers of a target draft layers begin as, and which parts of them; shapes will do.

    Args:
      target: its layers are stacked, as they are loaded.
      wanted: parameters of the config's drafter.
      config: of it.

    Raises:
      InputError: no part of the target's last layers has the shape of a draft layer's.
    """
    depth, count, found = target.arch.num_hidden_layers, config.num_layers, to_params(target)
    if count > depth:
        raise InputError(
            f"drafter.init_layers='target' with drafter.num_layers={count}: the target has {depth} layers; ask for "
            "fewer, or set init_layers='random'"
        )
    layers, other = tuple(range(depth - count, depth)), ""
    taken, new = list[str](), list[str]()
    for part in _PARTS:
        names = [name for name in wanted if _part(name) == part]
        strange = next((name for name in names if not _fits(target, found, name, wanted[name], layers)), "")
        (new if strange else taken).append(part)
        other = other or strange
    if not taken:
        raise InputError(
            f"drafter.init_layers='target': the target's layers {list(layers)} have other shapes than a draft layer "
            f"({other.removeprefix(_LAYERS)} is {tuple(wanted[other].shape[1:])} in one); set init_layers='random'"
        )
    return Start(layers, tuple(taken), tuple(new))


def start_layers(state: TrainState, target: Target, config: DrafterConfig) -> tuple[TrainState, Start]:
    """The state of step 0 with draft layers that begin as the target's, on the shards that it has.

    Args:
      state: fresh.
      target: its layers are stacked.
      config: of the drafter.

    Raises:
      InputError: see `plan_layers`.
    """
    start, found = plan_layers(target, state.params, config), to_params(target)
    parts = {name: [_row(target, found, name, i) for i in start.layers] for name in state.params if _part(name)}
    parts = {name: rows for name, rows in parts.items() if _part(name) in start.taken}
    shardings = {name: leaf.sharding for name, leaf in state.params.items()}

    def begin(params: Params, parts: Mapping[str, list[tuple[jax.Array, int]]], norm: jax.Array) -> Params:
        own = {name: jnp.stack([stack[i] for stack, i in rows]) for name, rows in parts.items()}
        width = params["backbone.fc"].shape[1]
        # The context is the output of the highest tapped layer.
        own["backbone.fc"] = jnp.zeros_like(params["backbone.fc"]).at[-width:].set(jnp.eye(width))
        own["backbone.norm"] = norm
        if "attention" in start.taken:  # what normed the input of the last of these layers norms the context
            own["backbone.hidden_norm"] = own[f"{_LAYERS}attention_norm"][-1]
        return {name: jnp.asarray(own.get(name, old), old.dtype) for name, old in params.items()}

    params = jax.jit(begin, out_shardings=shardings)(state.params, parts, found["norm"])
    return dataclasses.replace(state, params=params), start


def _part(name: str) -> str:
    """The part of a layer that a parameter belongs to; empty for others, as those of convolutions."""
    first = name.removeprefix(_LAYERS).split(".")[0] if name.startswith(_LAYERS) else ""
    return next((part for part, names in _PARTS.items() if first in names), "")


def _row(target: Target, found: Params, name: str, layer: int) -> tuple[Any, int]:
    """The stack that has this parameter of a layer, None if none has, and the layer's place in it."""
    kind = target.family.kinds(target.arch)[layer]
    place = target.family.stack_layers(target.arch, kind).index(layer)
    return found.get(f"{target.stacks[kind]}.{name.removeprefix(_LAYERS)}"), place


def _fits(target: Target, found: Params, name: str, wanted: Any, layers: tuple[int, ...]) -> bool:
    stacks: Iterator[Any] = (_row(target, found, name, i)[0] for i in layers)
    return all(stack is not None and stack.shape[1:] == wanted.shape[1:] for stack in stacks)
