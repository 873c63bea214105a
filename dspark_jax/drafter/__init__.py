"""Draft models. `make_drafter` builds the one that a config names."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.autoregressive import Autoregressive
from dspark_jax.drafter.dspark import DSpark
from dspark_jax.drafter.eagle3 import Eagle3
from dspark_jax.drafter.mtp import MTP

AnyDrafter = DSpark | Autoregressive
"""Whatever `make_drafter` makes."""

_KINDS: dict[str, Any] = {"dspark": DSpark, "dflash": DSpark, "eagle3": Eagle3, "mtp": MTP}


def make_drafter(
    arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32
) -> AnyDrafter:
    """A randomly initialised drafter of `config.kind` for a target of shape `arch`."""
    return _KINDS[config.kind](arch, config, rngs=rngs, dtype=dtype)
