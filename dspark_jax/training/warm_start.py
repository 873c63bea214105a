"""Warm start: a fresh training state with the parameters of another drafter, e.g. to adapt it to a domain."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import InputError
from dspark_jax.training.state import TrainState, to_params


def warm_start(state: TrainState, drafter: nnx.Module, where: str) -> TrainState:
    """The state with the parameters of `drafter`, on the shards that it has.

    Args:
      state: of step 0.
      drafter: of exactly the same parameters, by name and shape; it may have been trained for another target.
      where: it was read from, for messages.

    Raises:
      InputError: a parameter is missing, has no place in the config's drafter, or has another shape.
    """
    found = to_params(drafter)
    source = f"train.init_from={where}"
    for name, wanted in state.params.items():
        if name not in found:
            raise InputError(f"{source}: it has no {name}; configure a drafter of its kind, or train from scratch")
        if found[name].shape != wanted.shape:
            raise InputError(
                f"{source}: {name} has shape {found[name].shape}, the config gives {wanted.shape}; "
                "configure a drafter of its shape"
            )
    for name in found:
        if name not in state.params:
            raise InputError(f"{source}: the config's drafter has no {name}; configure a drafter of its kind")
    params = {
        name: jax.device_put(jnp.asarray(found[name], wanted.dtype), wanted.sharding)
        for name, wanted in state.params.items()
    }
    return dataclasses.replace(state, params=params)
