"""Checks of the values that callers of the engine pass: each returns the value in its own type, or says what is wrong.

Every function takes the argument's name first and raises `InputError` with that name, the value and the remedy.
"""

import difflib
import numbers
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.errors import InputError

MOST = 2**31 - 1
"""The largest integer: what is counted on the device is int32."""


def integer(name: str, value: Any, least: int) -> int:
    """An integer from `least` to `MOST`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name}={_shown(value)} is {type(value).__name__}; an integer is needed")
    found = int(value)
    if not least <= found <= MOST:
        allowed = f"{least} or more" if found < least else f"at most {MOST}"
        raise InputError(f"{name}={found} is out of range; use {allowed}")
    return found


def real(name: str, value: Any) -> float:
    """A number; infinity and NaN are numbers too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name}={_shown(value)} is {type(value).__name__}; a number is needed")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{name}={_shown(value)} is too large; a number that fits a float is needed") from None


def boolean(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name}={_shown(value)} is neither True nor False")
    return bool(value)


def seconds(name: str, value: Any) -> float | None:
    """Seconds to wait, 0 or more; None, as for infinity, waits as long as it takes."""
    if value is None:
        return None
    found = real(name, value)
    if not found >= 0:
        raise InputError(f"{name}={_shown(value)} is out of range; use 0 or more seconds, or None to wait for ever")
    return None if found > threading.TIMEOUT_MAX else found


def token_ids(name: str, values: Any, vocab_size: int) -> np.ndarray:
    """Ids of a vocabulary: [N] int32; none is as good as any."""
    found = as_list(name, values, "of token ids")
    for one in found:
        if type(one) is not int and (isinstance(one, bool) or not isinstance(one, numbers.Integral)):
            raise InputError(f"{name} has {_shown(one)}, which is no token id; give integers")
        if not 0 <= int(one) < vocab_size:
            raise InputError(
                f"{name} has token {one} outside the vocabulary 0..{vocab_size - 1}; tokenise with the target's own "
                "tokenizer"
            )
    return np.asarray(found, np.int32)


def sizes(name: str, values: Any) -> tuple[int, ...]:
    """Integers from 1."""
    return tuple(integer(f"one of {name}", one, least=1) for one in as_list(name, values, "of integers"))


def as_list(name: str, values: Any, kind: str) -> Sequence[Any]:
    """A list, or an array as nested lists; no text, whose entries are characters."""
    if isinstance(values, np.ndarray | jax.Array) and values.ndim:
        return np.asarray(values).tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InputError(f"{name}={_shown(values)} is {type(values).__name__}; give a list {kind}")
    return values


def numeric(name: str, values: Any, *, integers: bool = False) -> np.ndarray | jax.Array:
    """One or more numbers as an array of the type that they have; works inside jit."""
    try:
        found = values if isinstance(values, jax.Array) else np.asarray(values)
    except (TypeError, ValueError):  # lists of several lengths
        found = np.asarray(None)
    if not any(jnp.issubdtype(found.dtype, kind) for kind in (np.integer, *(() if integers else (np.floating,)))):
        wanted = "integers are" if integers else "numbers are"
        raise InputError(f"{name}={_shown(values)} is {type(values).__name__}; {wanted} needed")
    return found


def array(name: str, values: Any, dtype: Any) -> jax.Array:
    """One or more numbers as an array of a type; nothing is rounded to an integer. Works inside jit."""
    integers = jnp.issubdtype(dtype, jnp.integer)
    found = numeric(name, values, integers=integers)
    if integers and isinstance(found, np.ndarray) and not (np.abs(found.astype(np.float64)) <= MOST).all():
        raise InputError(f"{name}={_shown(values)} is out of range; use at most {MOST}")
    return jnp.asarray(found, dtype)


def check_known(where: str, name: str, known: Sequence[str]) -> None:
    """Refuses the name of an argument that does not exist, with the nearest one that does."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        remedy = f"did you mean {near[0]}?" if near else "leave it out"
        raise InputError(f"{where}: {name}: no such parameter; {remedy}")


def check_keys(keys: Any, count: int) -> None:
    """Refuses what is not one random key for each of `count` requests."""
    if not isinstance(keys, jax.Array) or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (count,):
        kind = f"{keys.dtype} of shape {keys.shape}" if isinstance(keys, jax.Array) else type(keys).__name__
        raise InputError(f"keys is {kind}; give {count} random keys, e.g. those of request_keys")


def check_models(models: Any) -> None:
    """Refuses what is no `Models` of a target and a drafter."""
    if not (hasattr(models, "target") and hasattr(models, "drafter")):
        raise InputError(f"the models are {type(models).__name__}; give Models(target, drafter), or Models(target)")
    target, drafter = models.target, models.drafter
    if not hasattr(target, "arch"):
        raise InputError(f"the target of the models is {type(target).__name__}; load one with load_target")
    if not hasattr(drafter, "block_size"):
        raise InputError(
            f"the drafter of the models is {type(drafter).__name__}; load one with load_drafter, or leave it out to "
            "decode plainly"
        )


def _shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not the whole of a long one."""
    words = " ".join(repr(value).split())
    return words if len(words) <= 60 else words[:57] + "..."
