"""Warm start: a fresh training state with the parameters of another drafter, e.g. to adapt it to a domain."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import InputError
from dspark_jax.training.state import Params, TrainState, to_params


def warm_start(state: TrainState, drafter: nnx.Module) -> TrainState:
    """The state with the parameters of `drafter`, on the shards that it has.

    Args:
      state: of step 0.
      drafter: of exactly the same parameters, by name and shape; it may have been trained for another target.

    Raises:
      InputError: see `check_parameters`.
    """
    found = to_params(drafter)
    check_parameters(found, state.params)
    params = {
        name: jax.device_put(jnp.asarray(found[name], wanted.dtype), wanted.sharding)
        for name, wanted in state.params.items()
    }
    return dataclasses.replace(state, params=params)


def check_parameters(found: Params, wanted: Params) -> None:
    """Compares the parameters of a drafter with those of the config's; shapes will do.

    Raises:
      InputError: a parameter is missing, has no place in the config's drafter, or has another shape.
    """
    for name, leaf in wanted.items():
        if name not in found:
            raise InputError(f"it has no {name}; configure a drafter of its kind, or train from scratch")
        if found[name].shape != leaf.shape:
            raise InputError(
                f"{name} has shape {found[name].shape}, the config gives {leaf.shape}; configure a drafter of its shape"
            )
    for name in found:
        if name not in wanted:
            raise InputError(f"the config's drafter has no {name}; configure a drafter of its kind")
