"""What a device reaches, and what a call takes on it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax import platform

TURNS = 10
"""Of the loop inside one program, so that what the host needs to start it does not count."""

LONG = 0.02
"""Seconds of a call beside which that does not matter."""

CACHE = 128 << 20
"""Bytes that no second-level cache holds: of smaller arrays several copies are read in turn, up to 16."""

TINY = 1 << 20
"""Bytes of arrays that what runs before them leaves in the cache anyway."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches.

    Attributes:
      bytes: read or written per second in a copy.
      operations: floating point operations per second in a product of bfloat16.
    """

    bytes: float
    operations: float

    @classmethod
    def measured(cls) -> "Rates":
        """Of a large copy and a large product, on the first device."""
        size, side = (1 << 24, 512) if platform.current() == "cpu" else (1 << 29, 8192)
        row, square = jnp.ones((size,), jnp.float32), jnp.ones((side, side), jnp.bfloat16)
        copy = seconds(jax.jit(lambda x: x + 1), (row,))
        product = seconds(jax.jit(lambda x: x @ x), (square,))
        return cls(2 * row.nbytes / copy, 2 * side**3 / product)

    def floor(self, moved: float, operations: float = 0.0) -> float:
        """Seconds that moving these bytes and doing these operations takes at least, if both are done at once."""
        return max(moved / self.bytes, operations / self.operations)


def seconds(call: Callable[..., Any], arrays: Sequence[Any], *, repeats: int = 5, calls: int = 10) -> float:
    """Of one of several calls in a row (so that the device does not wait for the host), the best of several times."""
    jax.block_until_ready(call(*arrays))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = call(*arrays)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def device_seconds(function: Callable[..., Any], arrays: Sequence[Any], *, in_place: int = 0) -> float:
    """Of a call without what the host needs to start it: of small ones many are made inside one program.

    Args:
      function: of arrays; compiled here.
      arrays: small ones are copied, and the copies read in turn, so that they come from memory.
      in_place: the first of them that the function writes into and returns first; the next call gets them.
    """
    call = jax.jit(function)
    if not in_place and seconds(call, arrays, repeats=1, calls=2) > LONG:
        return seconds(call, arrays, repeats=3, calls=2)
    size = sum(x.nbytes for x in jax.tree.leaves(arrays))
    more = min(15, CACHE // size) if size > TINY else 0
    copies = [tuple(arrays), *(jax.tree.map(jnp.copy, tuple(arrays)) for _ in range(more))]
    like = jax.eval_shape(function, *arrays)
    written = [jax.tree.map(jnp.copy, one[:in_place]) for one in copies]
    rest = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.tree.leaves(like)[in_place:]) for _ in copies]
    carried = [[*first, *others] for first, others in zip(written, rest, strict=True)]
    program = jax.jit(functools.partial(_in_turn, function, in_place), donate_argnums=0)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        carried = jax.block_until_ready(program(carried, [one[in_place:] for one in copies]))
        times.append(time.perf_counter() - start)
    return min(times[1:]) / (TURNS * len(copies))


def _in_turn(function: Callable[..., Any], in_place: int, carried: Any, read: Any) -> Any:
    """What the last calls return. All of it is carried, so that the compiler leaves out nothing of any call."""

    def once(_: Any, state: Any) -> Any:
        (turn, carried), found = state, []
        for one, others in zip(carried, read, strict=True):
            # The barrier keeps it from calling once for all: the arguments depend on the turn.
            turn, one, others = jax.lax.optimization_barrier((turn + 1, one, others))
            found.append(jax.tree.leaves(function(*one[:in_place], *others)))
        return turn, found

    return jax.lax.fori_loop(0, TURNS, once, (jnp.int32(0), carried))[1]
