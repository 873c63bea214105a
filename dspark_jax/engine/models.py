"""Target and drafter in the form in which they decode."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax import platform
from dspark_jax.engine.state import round_rows
from dspark_jax.target.decode_weights import decode_weights


def for_decoding(target: Any, drafter: Any, *, batch_size: int, consume: bool = False) -> tuple[Any, Any]:
    """Target and drafter with their weights as decoding `batch_size` requests wants them here; to be made once.

    Models that have been through here are returned as they are. `generate` does this itself at every call, which takes
    some milliseconds of a small model and a second copy of a large one.

    Args:
      target: the language model.
      drafter: drafts for it, or None.
      batch_size: requests decoded together; on a CPU it decides how weights are held, elsewhere it does not matter.
      consume: give up the given models' weights while the new ones are made (on a GPU), so that there is never a second
        copy of all of them.
    """
    if not platform.unstacks_layers():
        return target, drafter
    if platform.current() == "cpu":
        return _on_cpu(target, drafter, batch_size=batch_size)
    forms = [decode_weights(model, model.dtype, separate_caches=True, consume=consume) for model in (target, drafter)
             if model is not None]  # fmt: skip
    return forms[0], forms[1] if drafter is not None else None


def when_loaded(model: Any) -> Any:
    """A target or drafter (or None) that has just been loaded to decode, in its form where no batch decides about it.

    That is on a GPU; the given model cannot be used any more there.
    """
    if platform.current() != "gpu":
        return model
    return decode_weights(model, model.dtype, separate_caches=True, consume=True) if model is not None else None


@functools.partial(jax.jit, static_argnames=("batch_size",))
def _on_cpu(target: Any, drafter: Any, *, batch_size: int) -> tuple[Any, Any]:
    separate = batch_size > 1
    target = decode_weights(target, _weight_type(target, batch_size * round_rows(drafter)), separate_caches=separate)
    return target, None if drafter is None else decode_weights(drafter, drafter.dtype, separate_caches=separate)


def _weight_type(target: Any, rows: int) -> Any:
    """Type in which a CPU keeps a target's matrices while it decodes `rows` tokens at a time.

    Bfloat16 loses nothing where the checkpoint was bfloat16 (`ops.product.exact`) and is faster for several rows; one
    row is fastest as a float32 product.
    """
    narrow = target.narrow and rows > 1 and platform.has_matrix_units()
    return jnp.bfloat16 if narrow or target.dtype == jnp.bfloat16 else jnp.float32
