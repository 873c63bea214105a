"""Products on bfloat16 units against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops import product as module
from dspark_jax.ops.product import bfloat16_product, exact, product

T, D, F = 5, 300, 33


def operands():
    rows = jax.random.normal(jax.random.key(0), (T, D)) * jnp.exp(3 * jax.random.normal(jax.random.key(1), (T, 1)))
    return rows, jax.random.normal(jax.random.key(2), (D, F))


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def test_exact_keeps_float32_accuracy():
    rows, matrix = operands()
    matrix = matrix.astype(jnp.bfloat16)
    expected = wide(rows) @ wide(matrix)
    error = np.abs(np.asarray(jax.jit(exact)(rows, matrix)) - expected)
    # As a float32 sum of D terms: half a unit in the last place of the sum of magnitudes for every few terms.
    bound = 2.0**-24 * np.sqrt(D) * (np.abs(wide(rows)) @ np.abs(wide(matrix)))
    assert (error < bound).all()
    rounded = np.asarray(bfloat16_product(rows, matrix))
    assert (np.abs(rounded - expected) > bound).any()  # one bfloat16 product would not do


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("rows_type", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("matrix_type", [jnp.float32, jnp.bfloat16])
def test_product_has_the_accuracy_of_its_rows(monkeypatch, units, rows_type, matrix_type):
    monkeypatch.setattr(module, "has_matrix_units", lambda: units)
    rows, matrix = operands()
    rows, matrix = rows.astype(rows_type), matrix.astype(matrix_type)
    for result in (None, jnp.float32):
        found = product(rows, matrix, result)
        assert found.dtype == (result or rows_type)
        # Rounded where the rows' type rounds: the matrix to it, and the result.
        unit = 2.0**-24 * np.sqrt(D) if rows_type == jnp.float32 else 2.0**-8
        bound = unit * (np.abs(wide(rows)) @ np.abs(wide(matrix)))
        assert (np.abs(wide(found) - wide(rows) @ wide(matrix)) <= bound).all()


@pytest.mark.parametrize("shape", [(7, 16, 3), (5, 7, 16, 3)])
def test_gradients_have_the_operands_types(shape):
    *lead, d, f = shape
    left = jax.random.normal(jax.random.key(0), (*lead, d)).astype(jnp.bfloat16)
    right = jax.random.normal(jax.random.key(1), (*lead[:-1], d, f))
    cotangent = jax.random.normal(jax.random.key(2), (*lead, f))
    _, pull = jax.vjp(bfloat16_product, left, right)
    _, pull_wide = jax.vjp(jnp.matmul, left.astype(jnp.float32), right)
    for found, expected, operand in zip(pull(cotangent), pull_wide(cotangent), (left, right), strict=True):
        assert found.dtype == operand.dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=16 * 2**-8, rtol=2**-8)
