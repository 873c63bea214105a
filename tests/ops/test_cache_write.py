"""`cache_write` against a loop over rows, and its guarantees about what it leaves alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import MeshConfig
from dspark_jax.ops.cache_write import cache_write
from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.sharding import make_mesh, sharding

IMPLEMENTATIONS = ["xla", "reference", "pallas_tpu"]
PLACES = {
    "the ends, and in between": (3, [[0, 45, 7, 29, 16]]),
    "one row": (1, [[47, 0, 15, 16, 31]]),
    "rows of three tiles": (33, [[15, 0, 14, 1, 2]]),
    "whole tiles": (16, [[0, 16, 32, 16, 0]]),
    "more tiles than the cache has": (48, [[0, 0, 0, 0, 0]]),
    "two places, also of one tile": (4, [[40, 44, 9, 20, 3], [1, -1, 13, 36, -1]]),
}
"""New rows, and their places in 48."""


def problem(t: int, requests: int = 5, dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(t)
    cache, new = (3, requests, 2, 48, 16), (requests, 2, t, 16)
    return [np.array(jnp.asarray(rng.normal(size=size), dtype)) for size in (cache, cache, new, new)]


def loop(arrays: list[np.ndarray], places: list[list[int]], layer: int) -> list[np.ndarray]:
    """The caches; NaN where anything may be."""
    out = [x.copy() for x in arrays[:2]]
    t = arrays[2].shape[2]
    for cache, new in zip(out, arrays[2:], strict=True):
        for each in places:
            for request, place in enumerate(each):
                if place >= 0:
                    cache[layer, request, :, place : place + t] = new[request]
        for request in range(new.shape[0]):
            if min(each[request] for each in places) < 0:
                cache[layer, request, :, :t] = np.nan
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("t", "places"), PLACES.values(), ids=PLACES)
def test_against_a_loop(implementation: str, t: int, places: list[list[int]]) -> None:
    """All that is not written stays, also in the other layers; the layer's number may be traced."""
    arrays = problem(t)
    run = jax.jit(functools.partial(cache_write, implementation=implementation))
    for layer in (0, 2):
        got = run(*map(jnp.asarray, arrays), jnp.asarray(places, jnp.int32), layer=layer)
        for found, want in zip(got, loop(arrays, places, layer), strict=True):
            known = ~np.isnan(want)
            np.testing.assert_array_equal(np.asarray(found)[known], want[known])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_request_and_bfloat16(implementation: str) -> None:
    arrays = problem(3, requests=1, dtype=jnp.bfloat16)
    got = cache_write(*map(jnp.asarray, arrays), jnp.asarray([[30]]), layer=1, implementation=implementation)
    for found, want in zip(got, loop(arrays, [[30]], 1), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(found, np.float32), want.astype(np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_are_not_finite_stay_where_they_belong(implementation: str) -> None:
    arrays = problem(3)
    arrays[2][1, :, 2], arrays[0][:, :, :, 40] = np.nan, np.inf
    places = [[4, 9, 20, 31, 43]]
    got = cache_write(*map(jnp.asarray, arrays), jnp.asarray(places), layer=1, implementation=implementation)[0]
    want = loop(arrays, places, 1)[0]
    np.testing.assert_array_equal(np.asarray(got), want)
    assert np.isnan(want).sum() == 2 * 16


@pytest.mark.slow
def test_the_kernel_for_tpus_reads_nothing_that_was_not_written(strict_tpu: Callable[[], bool]) -> None:
    t, places = PLACES["two places, also of one tile"]
    arrays = problem(t)
    got = cache_write(*map(jnp.asarray, arrays), jnp.asarray(places), layer=1, implementation="pallas_tpu")
    for found, want in zip(got, loop(arrays, places, 1), strict=True):
        known = ~np.isnan(want)
        np.testing.assert_array_equal(np.asarray(found)[known], want[known])
    assert not strict_tpu()


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_eight_devices_equal_one(implementation: str) -> None:
    arrays, places = problem(3, requests=4), [[0, 45, 7, 29]]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    cache, new = (None, "batch", "kv_heads", None, None), ("batch", "kv_heads", None, None)
    with jax.set_mesh(mesh):
        split = [
            jax.device_put(x, sharding(axes, x.shape, mesh))
            for x, axes in zip(arrays, (cache, cache, new, new), strict=True)
        ]
        run = jax.jit(functools.partial(cache_write, layer=1, implementation=implementation))
        got = run(*split, jnp.asarray(places))
    for found, want in zip(got, loop(arrays, places, 1), strict=True):
        np.testing.assert_array_equal(found, want)


def test_refusals() -> None:
    arrays, places = [jnp.asarray(x) for x in problem(3)], jnp.zeros((1, 5), jnp.int32)
    with pytest.raises(ValueError, match="do not fit key"):
        cache_write(*arrays[:3], arrays[3][:, :, :2], places, layer=0)
    with pytest.raises(ValueError, match="are not those of 5 requests"):
        cache_write(*arrays, places[:, :4], layer=0)
    odd = [x[:, :, :, :47] if x.ndim == 5 else x for x in arrays]
    with pytest.raises(Unsupported, match="a cache is no whole number of tiles"):
        cache_write(*odd, places, layer=0, implementation="pallas_tpu")
    half = [x.astype(jnp.float16) for x in arrays]
    with pytest.raises(Unsupported, match="neither bfloat16 nor float32"):
        cache_write(*half, places, layer=0, implementation="pallas_tpu")
    long = [jnp.zeros((1, 1, 1, 80, 16))] * 2 + [jnp.zeros((1, 1, 65, 16))] * 2
    with pytest.raises(Unsupported, match="there are many rows"):
        cache_write(*long, places[:, :1], layer=0, implementation="pallas_tpu")
