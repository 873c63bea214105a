"""What the TPU kernels share: Pallas with its Mosaic backend. None of them has ever run on a TPU (docs/kernels.md)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dspark_jax import platform
from dspark_jax.ops.dispatch import Unsupported

MASKED = -1e30
"""Score of what is not visible: finite, so that a tile of nothing else stays free of NaN."""

LANES = 128
"""Numbers in the last axis of a register; a block's last axis is a multiple of it, or the array's whole one."""

INTERPRETER: Any = True
"""What `interpret` is where there is no TPU; tests put `InterpretParams` here, which finds races and unset memory."""


def check(**holds: bool) -> None:
    """Refuses where one of the named conditions does not hold.

    Raises:
      Unsupported: names the first one (underscores are blanks).
    """
    for name, value in holds.items():
        if not value:
            raise Unsupported(name.replace("_", " "))


def call(
    kernel: Callable[..., None],
    tables: Sequence[jax.Array],
    inputs: Sequence[jax.Array],
    in_specs: Sequence[Any],
    out_shape: Any,
    out_specs: Any,
    *,
    grid: tuple[int, ...],
    parallel: int,
    scratch: Sequence[Any] = (),
    flops: float = 0,
    exponentials: int = 0,
    moved: int | None = None,
    memory: int | None = None,
    in_place: Sequence[int] = (),
    keeps: bool = False,
) -> Any:
    """`pallas_call` with the Mosaic backend; interpreted where the program is not for a TPU.

    Args:
      kernel: takes the references of tables, inputs, outputs and scratch.
      tables: int32, held in scalar memory; index maps take their references after the grid's indices.
      inputs: of the kernel.
      in_specs: blocks of the inputs.
      out_shape: of the outputs.
      out_specs: blocks of the outputs.
      grid: the last axis turns fastest.
      parallel: so many leading axes of the grid are independent of each other; the others are gone through in order.
      scratch: memory that lasts over the grid.
      flops: what the compiler and `plan` are told of the products.
      exponentials: and of the rest.
      moved: bytes that they are told are read and written; None: inputs and outputs once.
      memory: bytes on the chip that the kernel may take; None: what the compiler gives every kernel.
      in_place: numbers of the inputs whose memory the first outputs take, where nobody needs them any more.
      keeps: these outputs keep what no turn writes, interpreted ones too. (Else those do not take the memory: the
        interpreter of JAX 0.10.2 cannot do it where blocks do not divide the array.)
    """
    once = sum(x.size * x.dtype.itemsize for x in (*inputs, *jax.tree.leaves(out_shape)))
    told = pl.CostEstimate(
        flops=int(flops), transcendentals=exponentials, bytes_accessed=once if moved is None else moved
    )
    compiled = platform.current() == "tpu"
    aliases = {len(tables) + given: out for out, given in enumerate(in_place)} if compiled or keeps else {}
    order: list[Any] = ["parallel"] * parallel + ["arbitrary"] * (len(grid) - parallel)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
            in_specs=list(in_specs),
            out_specs=out_specs,
            scratch_shapes=list(scratch),
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=memory),
        cost_estimate=told,
        interpret=False if compiled else INTERPRETER,
    )(*tables, *inputs)


def dot(left: jax.Array, right: jax.Array, *, transposed: bool = False) -> jax.Array:
    """left [M, K] @ right [K, N] (or [N, K], transposed), summed in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def numbers(shape: tuple[int, ...], axis: int) -> jax.Array:
    """0, 1, ... along an axis, int32; a TPU has no vectors of one axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
