"""Attention against a float64 loop over single rows, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import MeshConfig
from dspark_jax.ops.attention import attention, cudnn, pallas_gpu, pallas_tpu, xla
from dspark_jax.ops.attention.pallas_tpu import Tiles
from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.ops.triton_attention import Tile
from dspark_jax.sharding import make_mesh, sharding


def directly(module, **settings):
    """A module's implementation, called as `attention` is, with settings of its own."""

    def run(q, k, v, *, scale, window=0, limit=None, starts=None, sinks=None):
        return module.attention(q, k, v, limit, starts, scale=scale, window=window, sinks=sinks, **settings)

    return run


IMPLEMENTATIONS = {
    "xla": attention,
    "reference": functools.partial(attention, implementation="reference"),
    "chunks of four rows": directly(xla, chunk=4),
    "kernel for TPUs": directly(pallas_tpu, tiles=Tiles(4, 3)),
    "kernel for GPUs": directly(pallas_gpu, tile=Tile(4, 4, 4, 1)),
}
KERNELS = [name for name in IMPLEMENTATIONS if "kernel" in name]


def problem(t=11, s=11, n=6, k=2, h=16, seed=3):
    rng = np.random.default_rng(seed)
    shapes = ((2, t, n, h), (2, s, k, h), (2, s, k, h))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes], rng


def loop(query, key, value, limit, first, scale, sinks=None):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    repeat = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(query.shape[:3]):
        seen = slice(first[b, t], limit[b, t])
        scores = key[b, seen, n // repeat] @ query[b, t, n] * scale
        weights, sink = np.exp(scores), 0 if sinks is None else np.exp(sinks[n])
        out[b, t, n] = weights @ value[b, seen, n // repeat] / (weights.sum() + sink)
    return out


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [0, 1, 4])
def test_equals_loops(run, window):
    """Causal rows, rows with limits of their own, and rows of documents."""
    arrays, rng = problem()
    rows = np.broadcast_to(np.arange(11), (2, 11))
    documents = np.stack([np.repeat([0, 5], [5, 6]), np.repeat([0, 1, 10], [1, 9, 1])])
    own = rng.integers(1, 12, (2, 11))
    cases = ((None, None), (own, None), (None, documents), (own, np.minimum(documents, own - 1)))
    for limit, starts in cases:
        given = {name: jnp.asarray(x) for name, x in (("limit", limit), ("starts", starts)) if x is not None}
        got = jax.jit(functools.partial(run, scale=0.5, window=window))(*arrays, **given)
        limit = rows + 1 if limit is None else limit
        first = np.maximum(limit - window if window else 0, 0 if starts is None else starts)
        want = loop(*arrays, limit, np.broadcast_to(first, limit.shape), 0.5)
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_sinks_take_their_share_and_give_nothing(run):
    """Some next to nothing, one far above all scores; of packed documents in a window."""
    arrays, _ = problem()
    sinks, rows = np.array([-80.0, -1.0, 0.0, 0.5, 3.0, 60.0], np.float32), np.broadcast_to(np.arange(11), (2, 11))
    documents = np.stack([np.repeat([0, 5], [5, 6]), np.zeros(11, np.int64)])
    got = run(*arrays, scale=0.5, window=4, starts=jnp.asarray(documents), sinks=jnp.asarray(sinks))
    want = loop(*arrays, rows + 1, np.maximum(rows - 3, documents), 0.5, sinks.astype(np.float64))
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_more_keys_than_rows_and_bfloat16(run):
    (query, key, value), rng = problem(t=3, s=17)
    limit = rng.integers(1, 18, (2, 3))
    narrow = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    got = run(*narrow, scale=0.5, limit=jnp.asarray(limit))
    assert got.dtype == jnp.bfloat16
    want = loop(*(x.astype(jnp.float32) for x in narrow), limit, np.zeros_like(limit), 0.5)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2**-7 * np.abs(want).max())


SHAPES = {
    "one of everything": {"t": 1, "s": 1, "n": 1, "k": 1},
    "whole tiles, one key head": {"t": 16, "s": 16, "n": 4, "k": 1},
    "no grouping, wider heads": {"t": 33, "s": 33, "n": 3, "k": 3, "h": 64},
    "more keys than rows": {"t": 5, "s": 40},
}


SIZES = {
    **{f"TPUs, {tiles}": directly(pallas_tpu, tiles=tiles) for tiles in (Tiles(16, 8), Tiles(4, 16), None)},
    **{f"GPUs, {tile}": directly(pallas_gpu, tile=tile) for tile in (Tile(16, 8, 4, 1), Tile(8, 32, 4, 1), None)},
}


@pytest.mark.slow
@pytest.mark.parametrize("run", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_at_hostile_shapes(shape, run):
    """Rows with limits and starts of their own, in a window and not, with sinks and not."""
    arrays, rng = problem(**shape)
    t, s = arrays[0].shape[1], arrays[1].shape[1]
    limit = rng.integers(1, s + 1, (2, t))
    starts = np.minimum(rng.integers(0, s, (2, t)), limit - 1)
    for window, sinks in ((0, None), (3, rng.normal(size=arrays[0].shape[2]))):
        given = {"limit": jnp.asarray(limit), "starts": jnp.asarray(starts)}
        given |= {"sinks": None if sinks is None else jnp.asarray(sinks, jnp.float32)}
        got = run(*arrays, scale=0.5, window=window, **given)
        first = np.maximum(limit - window, starts) if window else starts
        np.testing.assert_allclose(got, loop(*arrays, limit, first, 0.5, sinks), atol=4e-6)


@pytest.mark.slow
def test_the_kernel_for_tpus_reads_nothing_that_was_not_written(strict_tpu):
    """Interpreted as a TPU works: unset memory is NaN, reads beyond an array fail, races are found."""
    arrays, _ = problem(t=21, s=21)
    for window in (0, 5):
        got = directly(pallas_tpu, tiles=Tiles(8, 8))(*arrays, scale=0.5, window=window)
        limit = np.broadcast_to(np.arange(21) + 1, (2, 21))
        first = np.maximum(limit - window, 0) if window else 0 * limit
        np.testing.assert_allclose(got, loop(*arrays, limit, first, 0.5), atol=4e-6)
        assert not strict_tpu()


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_of_kernels_are_those_of_the_definition(name):
    arrays, _ = problem()
    documents = jnp.asarray(np.stack([np.repeat([0, 5], [5, 6]), np.zeros(11, np.int64)]))
    sinks = jnp.linspace(-1.0, 2.0, 6)

    def slopes(run):
        def total(query, key, value, sinks):
            return jnp.sum(run(query, key, value, scale=0.5, window=4, starts=documents, sinks=sinks) ** 2)

        return jax.grad(total, argnums=(0, 1, 2, 3))(*arrays, sinks)

    for got, want in zip(slopes(IMPLEMENTATIONS[name]), slopes(IMPLEMENTATIONS["reference"]), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_eight_devices_equal_one(name):
    rng = np.random.default_rng(0)
    axes = ("batch", None, "heads", None), *2 * (("batch", None, "kv_heads", None),)
    arrays = [jnp.asarray(rng.normal(size=(4, 11, n, 16)), jnp.float32) for n in (4, 2, 2)]
    sinks, starts = jnp.linspace(-1.0, 2.0, 4), jnp.asarray(np.repeat([[0, 5]], [5, 6], axis=1).repeat(4, axis=0))
    run = jax.jit(functools.partial(IMPLEMENTATIONS[name], scale=0.5, window=4))
    want = run(*arrays, starts=starts, sinks=sinks)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, sharding(names, x.shape, mesh)) for x, names in zip(arrays, axes, strict=True)]
        got = run(*split, starts=starts, sinks=sinks)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_refusals():
    (query, key, value), _ = problem()
    with pytest.raises(ValueError, match="do not fit"):
        attention(query, key, value[:, 1:], scale=1.0)
    with pytest.raises(ValueError, match="no multiple"):
        attention(query[:, :, :3], key, value, scale=1.0)
    with pytest.raises(ValueError, match="3 rows and 11 keys need a limit"):
        attention(query[:, :3], key, value, scale=1.0)
    with pytest.raises(ValueError, match="starts is"):
        attention(query, key, value, scale=1.0, starts=jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="sinks is"):
        attention(query, key, value, scale=1.0, sinks=jnp.zeros(2))
    with pytest.raises(Unsupported, match="heads have sinks"):
        attention(query, key, value, scale=1.0, sinks=jnp.zeros(6), implementation="cudnn")
    for name, (arrays, _) in {
        "the head width is no multiple of 16": problem(h=8),
        "a key head has too many query heads": problem(n=33, k=1),
        "a tile of rows is too large": problem(n=16, k=1, h=512),
    }.items():
        with pytest.raises(Unsupported, match=name):
            attention(*arrays, scale=1.0, implementation="pallas_tpu")
    with pytest.raises(Unsupported, match="the head width is no power of two"):
        attention(*problem(h=48)[0], scale=1.0, implementation="pallas_gpu")
    with pytest.raises(Unsupported, match="neither bfloat16 nor float32"):
        attention(*(x.astype(jnp.float16) for x in (query, key, value)), scale=1.0, implementation="pallas_tpu")
    with pytest.raises(Unsupported, match="float32"):
        cudnn.attention(query, key, value, None, None, scale=1.0, window=0)
    with pytest.raises(Unsupported, match="limits of their own"):
        attention(query, key, value, scale=1.0, limit=jnp.ones((2, 11), jnp.int32), implementation="cudnn")
