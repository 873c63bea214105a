"""What the GPU kernels share: Pallas with its Triton backend, on NVIDIA cards from Ampere on.

JAX announces that this backend will be removed one day; docs/kernels.md says why it is used all the same. Where it is
missing the kernels refuse, and the operations go on to their next implementation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dspark_jax import platform
from dspark_jax.ops.dispatch import Unsupported

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

MASKED = -1e30
"""Score of what is not visible: finite, so that a tile of nothing else stays free of NaN."""

HEAD_WIDTHS = (16, 32, 64, 128, 256, 512)
"""Of attention: sizes of Triton's tiles are powers of two."""

LOG2E = 1.4426950408889634
"""Kernels take powers of two instead of e."""


def check(**holds: bool) -> None:
    """Refuses where there is no Triton backend, or where one of the named conditions does not hold.

    Raises:
      Unsupported: names the first one (underscores are blanks).
    """
    if triton is None:
        raise Unsupported("this JAX has no Triton backend for Pallas")
    for name, value in holds.items():
        if not value:
            raise Unsupported(name.replace("_", " "))


def call(
    kernel: Callable[..., None],
    inputs: Sequence[jax.Array],
    in_specs: Sequence[Any],
    out_shape: Any,
    out_specs: Any,
    *,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    aliases: Mapping[int, int] | None = None,
) -> Any:
    """`pallas_call` with the Triton backend; interpreted where there is no GPU to run on.

    Args:
      kernel: takes the references of inputs and outputs.
      inputs: of the kernel.
      in_specs: blocks of the inputs.
      out_shape: of the outputs.
      out_specs: blocks of the outputs.
      grid: at most three axes.
      warps: of 32 threads, of one program.
      stages: loads of so many turns of a loop are under way at once.
      aliases: inputs whose memory outputs take, by number.
    """
    assert triton is not None
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        input_output_aliases=dict(aliases or {}),
        interpret=platform.current() != "gpu",
    )(*inputs)


def numbers(size: int, start: jax.Array | int = 0) -> jax.Array:
    """start, start + 1, ... as int32 [size]."""
    return start + jnp.arange(size, dtype=jnp.int32)


def load(ref: Any, index: Any, mask: jax.Array, other: Any = 0) -> jax.Array:
    """ref[index] where the mask holds, else `other`: nothing is read there."""
    assert triton is not None
    return triton.load(ref.at[index], mask=mask, other=other)


def store(ref: Any, index: Any, value: jax.Array, mask: jax.Array) -> None:
    """ref[index] = value where the mask holds."""
    assert triton is not None
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def rows_of(ref: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of whole rows [T] of a matrix; interpret mode takes arrays in all axes or in none."""
    return rows[:, None], numbers(ref.shape[1])[None, :]


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """left [M, K] @ right [K, N], summed in float32; float32 operands are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def power_of_two(value: int, least: int = 16) -> int:
    """The smallest power of two that is at least `value` and `least`: sizes of Triton's tiles."""
    return max(least, pl.next_power_of_2(max(value, 1)))
