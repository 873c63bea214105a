"""Products of rows with a weight matrix on the fastest units that a CPU has; on accelerators they are plain products.

XLA on CPU turns a bfloat16 product into a float32 one unless its result is float32 and no operand is a folded
transpose; only then does it reach the bfloat16 matrix units (AMX), which are three to four times faster, and read half
the bytes. The products here, forward and backward, are written so that they do.

Float32 products of a few rows stay XLA's own on a CPU without such units. It copies the matrix into panels first, which
takes longer than to multiply: all matrices of the embedded target (5.8 M numbers, one core of an Intel Xeon with
AVX-512 and 2 MB of L2) take 1.5 ms with one row, 2.3 with two, 3.5 with eight and 4.0 with sixteen. Nothing that XLA
offers is faster with eight rows: its libraries by compiler option (Eigen 3.1 to 4.1, oneDNN 6.2, its own loops 6.3),
the matrix the other way round (4.1), in panels of 16 to 128 columns (3.5 to 5.7), sums over blocks of 16 rows of the
matrix (4.6), row by row (9.1). PyTorch's MKL takes 2.7.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dspark_jax import platform
from dspark_jax.platform import has_matrix_units


def product(rows: jax.Array, matrix: jax.Array, result: jax.typing.DTypeLike | None = None) -> jax.Array:
    """rows [T, D] @ matrix [D, F] -> [T, F], summed in float32.

    Args:
      rows: their type is the type of the product; a wider matrix is rounded to it.
      matrix: a bfloat16 one times float32 rows loses nothing: it is multiplied as float32 or by `exact`.
      result: type of the result; the rows' type by default.
    """
    result = rows.dtype if result is None else result
    if rows.dtype == jnp.bfloat16 and platform.current() == "cpu":
        return bfloat16_product(rows, matrix).astype(result)
    if rows.dtype == jnp.float32 and matrix.dtype == jnp.bfloat16 and has_matrix_units():
        return exact(rows, matrix).astype(result)
    return jnp.matmul(rows, matrix.astype(rows.dtype), preferred_element_type=result)


def exact(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """Float32 rows [T, D] @ bfloat16 matrix [D, F] to float32 accuracy, on bfloat16 units.

    A float32 number is the sum of three bfloat16 numbers (three times 8 bits of mantissa) and products of bfloat16
    numbers are exact in float32, so three stacked bfloat16 products give what one float32 product gives.
    """
    rows = jax.lax.optimization_barrier(rows)  # computed once, not once for each part
    middle = rows - rows.astype(jnp.bfloat16).astype(jnp.float32)
    low = middle - middle.astype(jnp.bfloat16).astype(jnp.float32)
    part = jnp.arange(3)[:, None, None]  # a selection, which XLA vectorises where it does not a concatenation
    parts = jnp.where(part == 0, rows, jnp.where(part == 1, middle, low)).astype(jnp.bfloat16)
    sums = dot(parts.reshape(-1, rows.shape[1]), matrix).reshape(3, rows.shape[0], -1)
    return sums[0] + (sums[1] + sums[2])


def transposed(x: jax.Array) -> jax.Array:
    """The last two axes swapped in memory, not only in name."""
    return with_layout_constraint(x.swapaxes(-1, -2), Layout(major_to_minor=tuple(range(x.ndim))))


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """left [.., T, D] @ right [.., D, F] from bfloat16 operands, in float32; its own gradient is slow on CPU."""
    return jnp.matmul(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


@jax.custom_vjp
def bfloat16_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """`dot` with gradients that are computed the same way, each in the type of its operand."""
    return dot(left, right)


def _forward(left: jax.Array, right: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    narrow = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
    return dot(*narrow), (*narrow, jnp.zeros((), left.dtype), jnp.zeros((), right.dtype))


def _backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    left, right, like_left, like_right = kept
    gradient = jax.lax.optimization_barrier(gradient.astype(jnp.bfloat16))  # rounded once, for both products
    return (
        dot(gradient, transposed(right)).astype(like_left.dtype),
        dot(transposed(left), gradient).astype(like_right.dtype),
    )


bfloat16_product.defvjp(_forward, _backward)
