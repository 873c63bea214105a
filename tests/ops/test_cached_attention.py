"""`cached_attention` against a float64 loop over rows, heads and cache rows, at hostile shapes."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import MeshConfig
from dspark_jax.ops.cached_attention import Rows, cached_attention, pallas_gpu, pallas_tpu
from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.sharding import make_mesh


def loop(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    counts: list[int],
    positions: list[int],
    sinks: np.ndarray | None = None,
    **how: int,
) -> np.ndarray:
    """Row by row in float64; only visible cache rows are ever read."""
    out = np.zeros(query.shape)
    groups, flat = query.shape[1] // key.shape[1], 0
    for b, (count, start) in enumerate(zip(counts, positions, strict=True)):
        for i in range(count):
            last = start + i if how["causal"] else start + count - 1
            first = max(0, last + 1 - how["window"]) if how["window"] else 0
            for n in range(query.shape[1]):
                keys, values = key[b, n // groups, first : last + 1], value[b, n // groups, first : last + 1]
                scores = [math.fsum(x * y for x, y in zip(query[flat, n], k, strict=True)) * 0.37 for k in keys]
                weights = np.exp(np.asarray(scores) - max(scores))
                sink = 0.0 if sinks is None else np.exp(float(sinks[n]) - max(scores))
                out[flat, n] = weights @ values / (weights.sum() + sink)
            flat += 1
    return out


CASES = [
    # counts, positions, rows T, W, query heads, key heads, width, cache rows
    ([1], [0], 1, 1, 1, 1, 3, 1),
    ([3, 0, 1, 4], [5, 2, 0, 7], 9, 4, 4, 2, 8, 13),
    ([0, 0], [0, 3], 4, 2, 2, 1, 5, 6),
    ([2, 2, 2], [0, 1, 8], 6, 3, 6, 2, 4, 10),
    ([1, 5], [11, 0], 8, 5, 3, 3, 7, 12),
]
KERNEL_CASES = [
    # of which tiles of 16 rows are seen whole, in part and not at all
    ([3, 0, 1, 4, 2], [5, 2, 0, 37, 60], 11, 4, 6, 2, 16, 70),
    ([1, 0], [3, 0], 1, 1, 1, 1, 16, 9),
    ([6, 2], [30, 0], 8, 6, 4, 1, 16, 40),  # 24 rows of a request
]


def kernels(splits: int, most: int = 0) -> Callable[..., jax.Array]:
    """The kernels for GPUs, interpreted, with the api's defaults."""
    defaults = {"layer": None, "window": 0, "front": 0, "causal": True, "finite": False}
    defaults |= {"keys": 16, "splits": splits, "most": most}
    return lambda *arrays, **how: pallas_gpu.cached_attention(*arrays, **{**defaults, **how})


def tpu_kernel(keys: int) -> Callable[..., jax.Array]:
    """The kernel for TPUs, interpreted, with the api's defaults."""
    defaults = {"layer": None, "window": 0, "front": 0, "causal": True, "finite": False, "keys": keys}
    return lambda *arrays, **how: pallas_tpu.cached_attention(*arrays, **{**defaults, **how})


ATTENTION = {
    "xla": cached_attention,
    "reference": functools.partial(cached_attention, implementation="reference"),
    "kernels for GPUs": kernels(1),
    "kernels for GPUs, split": kernels(4),
    "kernels for GPUs, split, in tiles of 16 rows": kernels(2, 16),
    "kernel for TPUs": tpu_kernel(8),
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("window", "causal"), [(0, True), (1, True), (3, True), (0, False), (6, False)])
def test_against_a_loop(attention: str, window: int, causal: bool) -> None:
    """Lengths 0 and 1, grouped heads, windows; everything that nobody may see is NaN."""
    cases = KERNEL_CASES if "kernel" in attention else CASES
    for seed, (counts, positions, size, most, n, k, h, c) in enumerate(cases):
        rng = np.random.default_rng(seed)
        query = rng.normal(size=(size, n, h)).astype(np.float32)
        key, value = rng.normal(size=(2, len(counts), k, c, h)).astype(np.float32)
        for b, (count, start) in enumerate(zip(counts, positions, strict=True)):
            key[b, :, start + count if count else 0 :] = value[b, :, start + count if count else 0 :] = np.nan
            if window and count:  # in front of the first row's window
                key[b, :, : max(0, start + 1 - window)] = value[b, :, : max(0, start + 1 - window)] = np.nan
        rows = Rows.of(jnp.asarray(counts), jnp.asarray(positions), size=size, most=most)

        @jax.jit
        def run(query: jax.Array, key: jax.Array, value: jax.Array, rows: Rows) -> jax.Array:
            return ATTENTION[attention](query, key, value, rows, scale=0.37, window=window, causal=causal)

        got = run(*map(jnp.asarray, (query, key, value)), rows)
        wanted = loop(query.astype(np.float64), key, value, counts, positions, window=window, causal=causal)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * h)
        assert not np.asarray(got)[sum(counts) :].any()


SINKS = np.array([-60.0, -1.0, 0.5, 40.0, 2.0, 0.0], np.float32)


@pytest.mark.parametrize("attention", ATTENTION)
def test_sinks_take_their_share_and_give_nothing(attention: str) -> None:
    """Some next to nothing, one far above all scores."""
    counts, positions, size, most, n, k, h, c = KERNEL_CASES[0] if "kernel" in attention else CASES[1]
    rng = np.random.default_rng(1)
    query = rng.normal(size=(size, n, h)).astype(np.float32)
    key, value = rng.normal(size=(2, len(counts), k, c, h)).astype(np.float32)
    rows = Rows.of(jnp.asarray(counts), jnp.asarray(positions), size=size, most=most)
    sinks = SINKS[:n]
    got = ATTENTION[attention](*map(jnp.asarray, (query, key, value)), rows, scale=0.37, sinks=jnp.asarray(sinks))
    wanted = loop(query.astype(np.float64), key, value, counts, positions, sinks, window=0, causal=True)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5)


RINGS = [name if "split" not in name else pytest.param(name, marks=pytest.mark.slow) for name in ATTENTION]


@pytest.mark.parametrize("attention", RINGS)
@pytest.mark.parametrize(
    ("window", "most", "front", "ring", "causal"),
    [(1, 1, 1, 1, 1), (1, 3, 3, 3, 1), (4, 1, 2, 4, 1), (4, 3, 4, 6, 1), (5, 4, 4, 11, 1), (7, 3, 4, 10, 0)],
)
def test_a_window_over_a_ring(attention: str, window: int, most: int, front: int, ring: int, causal: int) -> None:
    """Position p is in row front + p mod R, in the first turn and later; what nobody may see is NaN."""
    counts, positions, (n, k, h) = [most, 1, 0, most], [0, 23, 9, 40], (4, 2, 16)
    rng = np.random.default_rng(ring)
    query = rng.normal(size=(sum(counts) + 1, n, h)).astype(np.float32)
    keys, values = rng.normal(size=(2, len(counts), k, 64, h)).astype(np.float32)
    cache = np.full((2, len(counts), k, front + ring + front - 1, h), np.nan, np.float32)
    for b, (count, start) in enumerate(zip(counts, positions, strict=True)):
        for position in range(max(0, start + 1 - window), start + count):
            cache[:, b, :, front + position % ring] = keys[b, :, position], values[b, :, position]
    rows = Rows.of(jnp.asarray(counts), jnp.asarray(positions), size=len(query), most=most)
    how = {"scale": 0.37, "window": window, "front": front, "causal": bool(causal)}
    sinks = SINKS[:n] if window == 4 else None
    how |= {"sinks": None if sinks is None else jnp.asarray(sinks)}
    got = jax.jit(lambda *given: ATTENTION[attention](*given, **how))(
        jnp.asarray(query), *map(jnp.asarray, cache), rows
    )
    wanted = loop(query.astype(np.float64), keys, values, counts, positions, sinks, window=window, causal=causal)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * h)


def test_a_finite_cache_needs_no_clearing_and_bfloat16_stays() -> None:
    counts, positions, size, most, n, k, h, c = CASES[1]
    rng = np.random.default_rng(3)
    query, (key, value) = rng.normal(size=(size, n, h)), rng.normal(size=(2, len(counts), k, c, h))
    rows = Rows.of(jnp.asarray(counts), jnp.asarray(positions), size=size, most=most)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    np.testing.assert_array_equal(
        cached_attention(*arrays, rows, scale=0.37, finite=True), cached_attention(*arrays, rows, scale=0.37)
    )
    narrow = [x.astype(jnp.bfloat16) for x in arrays]
    got = cached_attention(*narrow, rows, scale=0.37)
    assert got.dtype == jnp.bfloat16
    wanted = loop(*(np.asarray(x, np.float64) for x in narrow), counts, positions, window=0, causal=True)
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, atol=2**-8 * 4 * np.abs(wanted).max())


@pytest.mark.parametrize("attention", ["xla", "reference", "kernels for GPUs", "kernel for TPUs"])
def test_one_layer_of_a_stack(attention: str) -> None:
    counts, positions, size, most, n, k, h, c = KERNEL_CASES[1]
    rng = np.random.default_rng(4)
    query, key, value = (jnp.asarray(rng.normal(size=(*x, h)), jnp.float32) for x in ((size, n), *[(2, k, c)] * 2))
    rows = Rows.of(jnp.asarray(counts), jnp.asarray(positions), size=size, most=most)
    stacks = [jnp.full((3, *x.shape), jnp.nan).at[1].set(x) for x in (key, value)]

    @jax.jit
    def run(layer: jax.Array) -> jax.Array:
        return ATTENTION[attention](query, *stacks, rows, layer=layer, scale=0.37)

    wanted = cached_attention(query, key, value, rows, scale=0.37)
    np.testing.assert_allclose(run(jnp.int32(1)), wanted, atol=1e-5)


@pytest.mark.parametrize("window", [0, 20])
def test_the_kernel_for_tpus_at_the_end_of_the_cache(window: int) -> None:
    """Tiles that a window sees whole, and the last one, which goes beyond a cache that is promised to be finite."""
    counts, positions, (n, k, h, c) = [3, 0, 2], [37, 2, 68], (6, 2, 16, 70)
    rng = np.random.default_rng(8)
    query, (key, value) = rng.normal(size=(5, n, h)), rng.normal(size=(2, 3, k, c, h))
    rows = Rows.of(jnp.asarray(counts), jnp.asarray(positions), size=5, most=4)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    got = tpu_kernel(8)(*arrays, rows, scale=0.37, window=window, finite=True)
    wanted = loop(query, key, value, counts, positions, window=window, causal=True)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * h)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3])
def test_the_kernel_for_tpus_reads_nothing_that_was_not_written(window: int, strict_tpu: Callable[[], bool]) -> None:
    """Interpreted as a TPU works: unset memory is NaN, what a tile holds beyond the cache too; races are found."""
    counts, positions, size, most, n, k, h, c = KERNEL_CASES[0]
    rng = np.random.default_rng(6)
    query, (key, value) = rng.normal(size=(size, n, h)), rng.normal(size=(2, len(counts), k, c, h))
    rows = Rows.of(jnp.asarray(counts), jnp.asarray(positions), size=size, most=most)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    got = tpu_kernel(16)(*arrays, rows, scale=0.37, window=window, finite=True)
    wanted = loop(query, key, value, counts, positions, window=window, causal=True)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert not strict_tpu()


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True])
def test_the_kernel_for_tpus_in_bfloat16_with_its_own_tiles(ring: bool) -> None:
    rng = np.random.default_rng(7)
    most, n, k, h, c = 8, 10, 2, 64, 2500  # two tiles of 2048, five query heads per key head
    query, (key, value) = rng.normal(size=(3 * most, n, h)), rng.normal(size=(2, 3, k, c, h))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    rows = Rows.whole(jnp.asarray([0, 2039, 9000 if ring else 2400]), most)
    how = {"scale": 0.37, "window": 2400 if ring else 0, "front": most if ring else 0}
    got = tpu_kernel(0)(*arrays, rows, **how)
    wanted = cached_attention(*(x.astype(jnp.float32) for x in arrays), rows, **how, implementation="xla")
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=2**-8 * 4 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [kernels(2), tpu_kernel(16)], ids=["GPUs", "TPUs"])
def test_kernels_on_eight_devices_equal_one(kernel: Callable[..., jax.Array]) -> None:
    """Rows of every request, which the kernels split over devices; ragged ones of several devices they refuse."""
    rng = np.random.default_rng(5)
    query, (key, value) = rng.normal(size=(12, 4, 16)), rng.normal(size=(2, 4, 2, 40, 16))
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    rows = Rows.whole(jnp.asarray([0, 9, 20, 37]), 3)
    sinks = jnp.asarray(SINKS[1:5])
    run = jax.jit(lambda *given: kernel(*given, scale=0.37, sinks=sinks))
    wanted = cached_attention(*arrays, rows, scale=0.37, sinks=sinks)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        np.testing.assert_allclose(run(*arrays, rows), wanted, atol=1e-6)
        ragged = Rows.of(jnp.full((4,), 3), rows.positions, size=12, most=3)
        with pytest.raises(Unsupported, match="flat rows of several devices"):
            run(*arrays, ragged)


def test_the_kernel_for_tpus_refuses_what_it_cannot_do() -> None:
    for width, most, dtype, message in (
        (8, 2, jnp.float32, "the head width is no multiple of 16"),
        (16, 2, jnp.float16, "neither bfloat16 nor float32"),
        (16, 513, jnp.float32, "a request has too many rows"),
    ):
        query, key = jnp.zeros((most, 1, width), dtype), jnp.zeros((1, 1, 512, width), dtype)
        rows = Rows.whole(jnp.zeros((1,), jnp.int32), most)
        with pytest.raises(Unsupported, match=message):
            cached_attention(query, key, key, rows, scale=1.0, implementation="pallas_tpu")


@pytest.mark.parametrize("kernel", [kernels(0), tpu_kernel(0)], ids=["GPUs", "TPUs"])
@pytest.mark.parametrize(("most", "n", "k", "h"), [(17, 16, 1, 512), (64, 16, 2, 32)])
def test_long_blocks(kernel: Callable[..., jax.Array], most: int, n: int, k: int, h: int) -> None:
    """Hundreds of rows for one key head, in tiles of the kernels' own sizes: 16 drafts of Gemma 4 are 272."""
    rng = np.random.default_rng(6)
    query, key, value = (rng.normal(size=size) for size in ((2 * most, n, h), (2, k, 200, h), (2, k, 200, h)))
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    rows = Rows.whole(jnp.asarray([130, 3]), most)
    got = jax.jit(functools.partial(kernel, scale=0.1))(*arrays, rows)
    np.testing.assert_allclose(got, cached_attention(*arrays, rows, scale=0.1), rtol=0, atol=5e-5)


def test_rows_of_requests() -> None:
    rows = Rows.of(jnp.asarray([2, 0, 3]), jnp.asarray([4, 9, 0]), size=7, most=3)
    assert rows.owner.tolist() == [0, 0, 2, 2, 2, 3, 3]
    assert rows.index.tolist()[:5] == [0, 1, 0, 1, 2] and rows.at.tolist() == [4, 5, 0, 1, 2, 0, 0]
    values = jnp.arange(9).reshape(3, 3)
    assert rows.flatten(values).tolist()[:5] == [0, 1, 6, 7, 8]
    back = rows.pad(rows.flatten(values))
    assert back[0, :2].tolist() == [0, 1] and back[2].tolist() == [6, 7, 8]


def test_rows_that_every_request_has() -> None:
    positions, values = jnp.asarray([4, 9, 0]), jnp.arange(6).reshape(3, 2)
    whole, same = Rows.whole(positions, 2), Rows.of(jnp.full((3,), 2), positions, size=6, most=2)
    for name in ("offsets", "counts", "positions", "owner", "index", "at", "real"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(same, name))
    assert whole.flatten(values).tolist() == same.flatten(values).tolist() == list(range(6))
    np.testing.assert_array_equal(whole.pad(whole.flatten(values)), values)


def test_what_does_not_fit_is_refused() -> None:
    query, key = jnp.zeros((4, 4, 8)), jnp.zeros((2, 2, 6, 8))
    rows = Rows.of(jnp.asarray([1, 2]), jnp.asarray([0, 0]), size=4, most=2)
    for arguments, more, message in (
        ((query, key, key[:, :, :5], rows), {}, "do not fit"),
        ((query[:, :3], key, key, rows), {}, "3 query heads"),
        ((query[:3], key, key, rows), {}, "rows are for"),
        ((query, key, key, rows), {"window": -2}, "window=-2 must be 0 or more"),
        ((query, key, key, rows), {"window": 4, "front": 2}, "no room for window=4 and blocks of 2"),
        ((query, key, key, rows), {"front": 1}, "no room for window=0"),
        ((query, key, key, rows), {"implementation": "cuda"}, "'cuda' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            cached_attention(*arguments, scale=1.0, **more)
