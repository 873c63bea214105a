"""What the backward pass keeps of a layer and what it computes again (`train.recompute`).

Whoever trains sets it around the forward pass with `recomputing`; drafters wrap their layers in `layer`, and what is
dear to compute passes through `dear` where it comes into being.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_DEAR = "dear"
_chosen = contextvars.ContextVar("recompute", default="layers")


@contextlib.contextmanager
def recomputing(what: str) -> Iterator[None]:
    """Sets what layers that are traced inside compute again in their backward pass, as `train.recompute` says."""
    before = _chosen.set(what)
    try:
        yield
    finally:
        _chosen.reset(before)


def layer(function: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    """`function`, of arrays and the number of a layer, with a backward pass that computes again what was chosen."""
    chosen = _chosen.get()
    if chosen == "nothing":
        return function
    keep = jax.checkpoint_policies.save_only_these_names(_DEAR) if chosen == "cheap" else None
    return jax.checkpoint(function, policy=keep, static_argnums=1)


def dear(x: jax.Array) -> jax.Array:
    """`x`, a product or the result of attention, which is kept where only what is cheap is computed again."""
    return checkpoint_name(x, _DEAR)
