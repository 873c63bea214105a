"""Features as 8-bit values: against the definition, and on the device as on the host."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from dspark_jax.data.feature_codec import Identity, code, code_on_device, dequantise, group_size, quantise


@pytest.mark.parametrize("hidden", [6, 64, 128, 256, 2560, 96, 131])
def test_quantisation_against_the_definition(hidden):
    """Float64 loops: each group's scale is its largest size / 127, rounded up to bfloat16; nothing is ever cut."""
    rng, group = np.random.default_rng(hidden), group_size(hidden)
    assert (
        group <= 128
        and hidden % group == 0
        and not any(hidden % n == 0 for n in range(group + 1, min(hidden, 128) + 1))
    )
    rows = (rng.normal(size=(5, hidden)) * 10.0 ** rng.integers(-6, 5, (5, 1))).astype(np.float32)
    rows[0, :] = 0
    rows[1, 3] = 30000  # a massive activation
    values, scales = quantise(rows, group)
    assert values.dtype == np.int8 and scales.shape == (5, hidden // group)
    back = np.asarray(dequantise(values, scales, np.float32))
    for t in range(5):
        for g in range(hidden // group):
            part = slice(g * group, (g + 1) * group)
            largest, scale = np.abs(rows[t, part]).max().astype(np.float64), float(scales[t, g])
            assert largest / 127 <= scale * (1 + 1e-6) and scale <= largest / 127 * (1 + 2**-7)
            for column in range(*part.indices(hidden)):
                assert abs(float(back[t, column]) - float(rows[t, column])) <= 0.5 * scale * (1 + 1e-6)
    assert (back[0] == 0).all()
    if hidden > 128 and group > 3:  # its neighbours in other groups are as fine as without it
        other, _ = quantise(np.where(rows == 30000, 0, rows), group)
        np.testing.assert_array_equal(values[:, group:], other[:, group:])


@pytest.mark.parametrize(("hidden", "kind"), [(2560, "float32"), (1024, "bfloat16"), (131, "float32")])
def test_the_device_codes_as_the_host_does(hidden, kind):
    """Bit for bit: numbers of all sizes, zeros, ties, outliers, and what is not finite past a length."""
    rng = np.random.default_rng(hidden)
    identity = Identity("t", "t", "d", "jax", (1,), hidden, "int8")
    rows = rng.normal(size=(3, 64, 2 * hidden)) * 10.0 ** rng.integers(-9, 9, (3, 64, 1))
    rows[0, 0], rows[0, 1, 3], rows[0, 2] = 0, 30000, np.round(rows[0, 2])
    rows[0, 3] = np.tile(np.arange(-127, 129) / 2, 2 * hidden)[: 2 * hidden]
    rows = rows.astype(kind if kind == "float32" else ml_dtypes.bfloat16)
    rows[1, 40:], rows[2, 5, 7] = np.inf, np.nan
    lengths = np.asarray([64, 40, 64])
    for one in (identity, dataclasses.replace(identity, dtype="bfloat16")):
        values, scales, finite = jax.device_get(jax.jit(code_on_device, static_argnums=2)(rows, lengths, one))
        assert finite.tolist() == [True, True, False] and values.dtype == one.value_type
        for row, count in enumerate(lengths[:2]):
            host = code([rows[row, :count, :hidden], rows[row, :count, hidden:]], one)
            assert host.finite and host.scales.shape == (count, one.groups)
            np.testing.assert_array_equal(values[row, :count], host.values)
            np.testing.assert_array_equal(scales[row, :count], host.scales)
