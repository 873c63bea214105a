"""Draft models. `make_drafter` builds the one that a config names."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.kinds import KINDS
from dspark_jax.registry import find


def make_drafter(
    arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32
) -> DrafterModule:
    """A randomly initialised drafter of `config.kind` for a target of shape `arch`.

    Raises:
      InputError: there is no such kind or head.
    """
    return find(KINDS, config.kind, "drafter.kind").load()(arch, config, rngs=rngs, dtype=dtype)
