"""The cache of keys and values: rows written where they belong, and, for a TPU, without moving the rest."""

import dataclasses
import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.cached_attention import Rows
from dspark_jax.target.cache import KVCache

ARCH = TargetArchitecture("qwen3", 64, 32, 3, 4, 2, 8, 32, 1e-6, 1e4, True, 64)
LENGTH, STEPS = 12, 3


def filled(batch: int, separate: bool, seed: int = 0) -> KVCache:
    zeros = KVCache.zeros(ARCH.num_hidden_layers, batch, LENGTH, ARCH, jnp.float32, separate=separate)
    leaves, tree = jax.tree.flatten(zeros)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


def stored(cache: KVCache) -> np.ndarray:
    """[2, L, B, K, C, H]."""
    return np.stack([np.stack([np.asarray(part[i]) for i in range(3)]) for part in (cache.keys, cache.values)])


def rows(batch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (2, batch, count, ARCH.num_key_value_heads, ARCH.head_dim)
    keys, values = rng.normal(size=shape).astype(np.float32)
    return keys, values


@pytest.mark.parametrize("separate", (False, True))
@pytest.mark.parametrize("batch", (1, 4))
def test_write_changes_its_rows_and_nothing_else(batch: int, separate: bool) -> None:
    cache, (keys, values) = filled(batch, separate), rows(batch, STEPS)
    starts = np.asarray([2, 0, 9, 5][:batch])
    expected = stored(cache)
    for part, new in zip(expected, (keys, values), strict=True):
        for request in range(batch):
            for step in range(STEPS):
                part[1, request, :, starts[request] + step] = new[request, step]
    found = jax.jit(lambda cache, *given: cache.write(1, *given))(cache, keys, values, jnp.asarray(starts))
    np.testing.assert_array_equal(stored(found), expected)


@pytest.mark.parametrize("separate", (False, True))
def test_flat_rows_go_to_their_owners_or_nowhere(separate: bool) -> None:
    batch, most, size = 4, 3, 10
    counts, positions = np.asarray([2, 0, 3, 1]), np.asarray([4, 7, 9, 0])
    cache, (keys, values) = filled(batch, separate), (part[0] for part in rows(1, size))
    expected, at = stored(cache), 0
    for request in range(batch):
        for step in range(counts[request]):
            for part, new in zip(expected, (keys, values), strict=True):
                part[2, request, :, positions[request] + step] = new[at]
            at += 1
    where = Rows.of(jnp.asarray(counts), jnp.asarray(positions), size=size, most=most)
    found = jax.jit(lambda cache, *given: cache.write_rows(2, *given))(cache, keys, values, where)
    np.testing.assert_array_equal(stored(found), expected)


RING, FRONT = 9, 2
assert LENGTH == FRONT + RING + FRONT - 1


@pytest.mark.parametrize("separate", (False, True))
@pytest.mark.parametrize("batch", (1, 3))
def test_a_ring_is_written_across_its_seam(batch: int, separate: bool) -> None:
    """Two rows of each request: as far as the ring goes and no row of it besides, and one row."""
    positions = np.asarray([8, 31, 27][:batch])  # rows 8 and 0, 4 and 5, 0 and 1 of the ring
    for count in (1, 2):
        cache, (keys, values) = dataclasses.replace(filled(batch, separate), front=FRONT), rows(batch, count)
        expected = stored(cache)[:, :, :, :, FRONT : FRONT + RING]
        for part, new in zip(expected, (keys, values), strict=True):
            for request in range(batch):
                for step in range(count):
                    part[1, request, :, (positions[request] + step) % RING] = new[request, step]
        found = jax.jit(lambda cache, *given: cache.write(1, *given))(cache, keys, values, jnp.asarray(positions))
        np.testing.assert_array_equal(stored(found)[:, :, :, :, FRONT : FRONT + RING], expected)
        flat = [part.reshape(-1, *part.shape[2:]) for part in (keys, values)]
        found = cache.write_rows(1, *flat, Rows.whole(jnp.asarray(positions), count))
        np.testing.assert_array_equal(stored(found)[:, :, :, :, FRONT : FRONT + RING], expected)


@pytest.mark.parametrize("separate", (False, True))
@pytest.mark.parametrize("count", (5, 29))
def test_a_ring_keeps_the_last_rows(count: int, separate: bool) -> None:
    """Prompts of any lengths go into it; it is read across its seam."""
    cache, (keys, values) = dataclasses.replace(filled(3, separate), front=FRONT), rows(3, count)
    starts, counts = np.asarray([0, 7, 30]), np.asarray([count, count - 4, 1])
    expected = stored(cache)
    for part, new in zip(expected, (keys, values), strict=True):
        for request in range(3):
            for step in range(counts[request]):
                part[1, request, :, FRONT + (starts[request] + step) % RING] = new[request, step]

    @jax.jit
    def run(cache: KVCache, keys: jax.Array, values: jax.Array) -> tuple[KVCache, tuple[jax.Array, jax.Array]]:
        cache = cache.write_last(1, keys, values, jnp.asarray(starts), jnp.asarray(counts))
        return cache, cache.before(1, jnp.asarray(starts + counts), 4)

    found, read = run(cache, keys, values)
    np.testing.assert_array_equal(stored(found), expected)
    for part, got in zip(expected, read, strict=True):
        for request, end in enumerate(starts + counts):
            for step in range(4):
                np.testing.assert_array_equal(got[request, step], part[1, request, :, FRONT + (end - 4 + step) % RING])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("flat", "front", "chips"), [(False, 0, 1), (False, 0, 4), (True, 0, 1), (False, 8, 1), (False, 8, 4)]
)
def test_a_tpu_keeps_the_cache_where_it_is(flat: bool, front: int, chips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing and reading layer by layer, rings too, needs far less memory than another copy of the cache.

    Chips that share the requests do not talk.
    """
    from dspark_jax.planning.topology import devices_of

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # devices_of sets them; undone after the test
        monkeypatch.delenv(name)
    layers, batch, length, count = 4, 16, 1024, 8
    arch = TargetArchitecture("qwen3", 64, 1024, layers, 16, 8, 128, 32, 1e-6, 1e4, True, length)
    mesh = Mesh(np.asarray(devices_of("v5e:2x2")[1][:chips]), ("x",))

    def program(cache: KVCache, x: jax.Array, starts: jax.Array) -> tuple[KVCache, jax.Array]:
        owners = Rows.of(jnp.full(batch, count), starts, size=batch * count, most=count) if flat else None

        def layer(carry: tuple[KVCache, jax.Array], index: jax.Array) -> tuple[tuple[KVCache, jax.Array], None]:
            cache, x = carry
            if owners is None:
                cache = cache.write(index, x, 2 * x, starts)
            else:
                cache = cache.write_rows(index, *(part.reshape(-1, 8, 128) for part in (x, 2 * x)), owners)
            keys, values = cache.stored(index)
            scores = jnp.einsum("btkh,bkch->bktc", x, keys)
            return (cache, x + jnp.einsum("bktc,bkch->btkh", scores, values)), None

        return jax.lax.scan(layer, (cache, x), jnp.arange(layers))[0]

    zeros = functools.partial(KVCache.zeros, layers, batch, length, arch, jnp.bfloat16)
    shapes = (
        dataclasses.replace(jax.eval_shape(zeros), front=front),
        jax.ShapeDtypeStruct((batch, count, 8, 128), jnp.bfloat16),
    )
    given = [*shapes, jax.ShapeDtypeStruct((batch,), jnp.int32)]

    def split(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = PartitionSpec(*(None,) * leaf.shape.index(batch), "x")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, axes))

    compiled = jax.jit(program, donate_argnums=0).lower(*jax.tree.map(split, given)).compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes[0]))
    assert compiled.memory_analysis().temp_size_in_bytes < held / chips / 4
    if chips > 1:
        assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
