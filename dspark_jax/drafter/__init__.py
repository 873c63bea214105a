"""Draft models. `make_drafter` builds the one that a config names."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.dspark import DSpark


def make_drafter(
    arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32
) -> DSpark:
    """A randomly initialised drafter of `config.kind` (dspark or dflash) for a target of shape `arch`."""
    return DSpark(arch, config, rngs=rngs, dtype=dtype)
