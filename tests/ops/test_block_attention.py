"""Block attention against float64 loops over single rows, and its guarantees about masks, NaN, memory and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import MeshConfig
from dspark_jax.ops.block_attention import block_attention, pallas_gpu, pallas_tpu, xla
from dspark_jax.ops.block_attention.pallas_gpu import Tile, Tiles
from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.sharding import make_mesh, sharding

NAMES = ("query", "context_key", "context_value", "block_key", "block_value")


def problem(b=2, a=4, g=3, s=11, n=4, k=2, h=16, dtype=np.float32, seed=0):
    """Arrays, anchors (0, the end and in between), keep (one False per sequence) and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    shapes = ((b, a, g, n, h), (b, s, k, h), (b, s, k, h), (b, a, g, k, h), (b, a, g, k, h))
    arrays = [np.array(jnp.asarray(rng.standard_normal(shape), dtype)) for shape in shapes]
    anchors = rng.integers(0, s + 1, (b, a))
    anchors.flat[0], anchors.flat[-1] = 0, s
    anchors[0, a // 2] = s
    keep = np.ones((b, a), bool)
    keep[:, -1] = a == 1
    return arrays, anchors.astype(np.int32), keep, rng.standard_normal(shapes[0])


def loops(arrays, anchors, keep, cotangent, scale, starts=None):
    """Output and gradients of sum(cotangent * output), one query row at a time."""
    starts = np.zeros_like(anchors) if starts is None else starts
    query, key, value, block_key, block_value = (np.asarray(x, np.float64) for x in arrays)
    out = np.zeros(query.shape)
    grads = [np.zeros(x.shape) for x in (query, key, value, block_key, block_value)]
    repeat = query.shape[3] // key.shape[2]
    for b, a, g, n in np.ndindex(query.shape[:4]):
        if not keep[b, a]:
            continue
        k, q, seen = n // repeat, query[b, a, g, n], slice(starts[b, a], anchors[b, a])
        end = anchors[b, a] - starts[b, a]
        keys = np.concatenate([key[b, seen, k], block_key[b, a, :, k]])
        values = np.concatenate([value[b, seen, k], block_value[b, a, :, k]])
        weights = np.exp(scale * keys @ q - np.max(scale * keys @ q))
        weights /= weights.sum()
        out[b, a, g, n] = weights @ values
        d_out = cotangent[b, a, g, n]
        d_scores = scale * weights * (values @ d_out - out[b, a, g, n] @ d_out)
        grads[0][b, a, g, n] = d_scores @ keys
        d_keys, d_values = np.outer(d_scores, q), np.outer(weights, d_out)
        grads[1][b, seen, k] += d_keys[:end]
        grads[2][b, seen, k] += d_values[:end]
        grads[3][b, a, :, k] += d_keys[end:]
        grads[4][b, a, :, k] += d_values[end:]
    return out, grads


def run(arrays, anchors, keep, cotangent, scale, attention=block_attention, starts=None):
    """Output and gradients of sum(cotangent * output)."""
    starts = jnp.zeros(anchors.shape, jnp.int32) if starts is None else starts

    @jax.jit
    def both(arrays):
        out, pull = jax.vjp(lambda *x: attention(*x, anchors, keep, starts, scale=scale), *arrays)
        return out, pull(jnp.asarray(cotangent, out.dtype))

    return both([jnp.asarray(x) for x in arrays])


# Tiles that end in the middle of blocks, and of the context; full ones, too, in the longer problem.
SMALL = Tiles(Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 0, 4, 1))
gpu_kernels = functools.partial(pallas_gpu.block_attention, tiles=SMALL)
tpu_kernels = functools.partial(pallas_tpu.block_attention, tiles=pallas_tpu.Tiles(2, 8))

IMPLEMENTATIONS = {
    "xla": block_attention,
    "reference": functools.partial(block_attention, implementation="reference"),
    "chunks of one block": functools.partial(xla.block_attention, max_scores=1),
    "three chunks, last one short": functools.partial(xla.block_attention, max_scores=2 * 4 * 3 * 11),
    "kernels for GPUs": gpu_kernels,
    "kernels for TPUs": tpu_kernels,
}


@pytest.mark.parametrize("attention", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_value_and_gradient_equal_loops(attention):
    data = problem(a=5)
    out, grads = run(*data, 0.3, attention)
    want, want_grads = loops(*data, 0.3)
    np.testing.assert_allclose(out, want, atol=2e-6)
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=4e-6, err_msg=name)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_blocks_of_a_packed_sequence_see_their_own_document_only(attention):
    data = problem(a=5)
    starts = np.minimum(np.random.default_rng(4).integers(0, 9, data[1].shape), data[1]).astype(np.int32)
    assert (starts == data[1]).any() and (starts > 0).any()  # also a document that begins with the anchor
    out, grads = run(*data, 0.3, attention, starts)
    want, want_grads = loops(*data, 0.3, starts)
    np.testing.assert_allclose(out, want, atol=2e-6)
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=4e-6, err_msg=name)


@pytest.mark.parametrize(
    "shape",
    [
        {"b": 1, "a": 1, "g": 1, "s": 1, "n": 1, "k": 1, "h": 1},
        {"a": 3, "g": 7, "s": 5, "n": 6, "k": 1, "h": 4},
        {"b": 1, "a": 2, "g": 2, "s": 13, "n": 3, "k": 3, "h": 5},
    ],
    ids=str,
)
def test_hostile_shapes(shape):
    data = problem(**shape, seed=3)
    out, grads = run(*data, 0.5)
    want, want_grads = loops(*data, 0.5)
    np.testing.assert_allclose(out, want, atol=2e-6)
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=4e-6, err_msg=name)


def test_bfloat16_differs_by_its_own_rounding_only():
    data = problem(dtype=jnp.bfloat16)
    out, grads = run(*data, 0.3)
    want, want_grads = loops(*data, 0.3)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2**-7 * np.abs(want).max())
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), grad, atol=2**-6 * np.abs(grad).max(), err_msg=name)


def test_huge_scores_do_not_overflow():
    arrays, *rest = problem()
    out, grads = run([100 * arrays[0], *arrays[1:]], *rest, 3.0)
    want, _ = loops([100 * arrays[0], *arrays[1:]], *rest, 3.0)
    np.testing.assert_allclose(out, want, atol=2e-3)  # scores of 1e3 have 1e-4 of rounding
    assert all(np.isfinite(grad).all() for grad in grads)


def slow_kernels(cases):
    """The cases as parameters; the kernels, which are interpreted, count as slow."""
    marks = {name: pytest.mark.slow if "kernels" in name else () for name in cases}
    return [pytest.param(run, id=name, marks=marks[name]) for name, run in cases.items()]


BOUNDED = {
    "chunks of one block": functools.partial(xla.block_attention, max_scores=1),
    "one chunk": functools.partial(xla.block_attention, max_scores=1 << 24),
    "kernels for GPUs": gpu_kernels,
    "kernels for TPUs": tpu_kernels,
}


@pytest.mark.parametrize("attention", slow_kernels(BOUNDED))
def test_unseen_nan_reaches_neither_output_nor_gradient(attention):
    arrays, anchors, keep, cotangent = problem()
    anchors[1] = np.minimum(anchors[1], 6)
    want = run(arrays, anchors, keep, cotangent, 0.3, attention)
    for index in (1, 2):
        arrays[index][1, 6:] = np.nan  # after every anchor of sequence 1
    for index in (0, 3, 4):
        arrays[index][:, -1] = np.nan  # the block that is not kept
    out, grads = run(arrays, anchors, keep, cotangent, 0.3, attention)
    assert not np.asarray(out)[:, -1].any()
    np.testing.assert_array_equal(out, want[0])
    for name, got, grad in zip(NAMES, grads, want[1], strict=True):
        np.testing.assert_array_equal(got, grad, err_msg=name)


def test_nothing_kept_gives_zeros():
    arrays, anchors, keep, cotangent = problem()
    out, grads = run(arrays, anchors, np.zeros_like(keep), cotangent, 0.3)
    assert not np.asarray(out).any()
    assert all(not np.asarray(grad).any() for grad in grads)


LONGER = {
    "GPUs": gpu_kernels,
    "TPUs": functools.partial(pallas_tpu.block_attention, tiles=pallas_tpu.Tiles(4, 16)),
    "TPUs, the sizes that it takes": pallas_tpu.block_attention,
}


@pytest.mark.slow
@pytest.mark.parametrize("kernels", LONGER.values(), ids=LONGER)
@pytest.mark.parametrize("e", [7, 3])
def test_kernels_at_a_longer_context(kernels, e):
    """Tiles that are seen whole, documents, blocks of other lengths than their keys, and an odd group of heads."""
    rng = np.random.default_rng(e)
    arrays, anchors, keep, cotangent = problem(b=2, a=13, g=7, s=200, n=6, k=2)
    arrays[3:] = [x[:, :, :e] for x in arrays[3:]]
    anchors = np.sort(rng.integers(0, 201, anchors.shape), axis=1).astype(np.int32)
    starts = (anchors // 70 * 70).astype(np.int32)
    data = arrays, anchors, keep, cotangent
    out, grads = run(*data, 0.3, kernels, starts)
    want, want_grads = loops(*data, 0.3, starts)
    np.testing.assert_allclose(out, want, atol=4e-6)
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=2e-5, err_msg=name)


TPU_SHAPES = {
    "one of everything": {"b": 1, "a": 1, "g": 1, "s": 1, "n": 1, "k": 1},
    "one key head": {"a": 3, "g": 7, "s": 5, "n": 6, "k": 1},
    "no grouping, wider heads": {"b": 1, "a": 5, "g": 2, "s": 17, "n": 3, "k": 3, "h": 48},
    "whole tiles": {"b": 1, "a": 4, "g": 4, "s": 16, "n": 4, "k": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", TPU_SHAPES.values(), ids=TPU_SHAPES)
def test_kernels_for_tpus_at_hostile_shapes(shape):
    data = problem(**shape, seed=3)
    out, grads = run(*data, 0.5, tpu_kernels)
    want, want_grads = loops(*data, 0.5)
    np.testing.assert_allclose(out, want, atol=2e-6)
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=4e-6, err_msg=name)


@pytest.mark.slow
def test_kernels_for_tpus_cut_the_heads_that_do_not_fit_together():
    """Of sixteen query heads of 512 for one key head, four at a time; their keys' gradients are added up."""
    assert pallas_tpu._parts(16, 4, 4 * 512) == 4 and pallas_tpu._parts(16, 7, 2 * 512) == 2
    assert pallas_tpu._parts(4, 7, 2 * 128) == 1 and pallas_tpu._parts(3, 999, 2 * 128) == 3
    data = problem(b=1, a=3, g=4, s=16, n=16, k=1, h=512)
    out, grads = run(*data, 0.04, pallas_tpu.block_attention)
    want, want_grads = loops(*data, 0.04)
    np.testing.assert_allclose(out, want, atol=1e-5)
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=1e-5 * np.abs(grad).max(), err_msg=name)


@pytest.mark.slow
def test_kernels_for_tpus_in_bfloat16():
    data = problem(dtype=jnp.bfloat16)
    out, grads = run(*data, 0.3, tpu_kernels)
    want, want_grads = loops(*data, 0.3)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2**-7 * np.abs(want).max())
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), grad, atol=2**-6 * np.abs(grad).max(), err_msg=name)


@pytest.mark.slow
def test_kernels_for_tpus_read_nothing_that_was_not_written(strict_tpu):
    """Interpreted as a TPU works: unset memory is NaN, reads beyond an array fail, races are found."""
    arrays, anchors, keep, cotangent = problem(b=1, a=5, s=20)
    anchors[:] = np.minimum(anchors, 12)  # the last key tile is nobody's
    data = arrays, anchors, keep, cotangent
    out, grads = run(*data, 0.3, tpu_kernels)
    want, want_grads = loops(*data, 0.3)
    np.testing.assert_allclose(out, want, atol=2e-6)
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=4e-6, err_msg=name)
    assert not strict_tpu()


def test_kernels_for_tpus_refuse_what_they_cannot_do():
    arrays, anchors, keep, _ = problem(h=8)
    with pytest.raises(Unsupported, match="the head width is no multiple of 16"):
        block_attention(*arrays, anchors, keep, scale=1.0, implementation="pallas_tpu")
    arrays, anchors, keep, _ = problem(g=300)
    with pytest.raises(Unsupported, match="a block has too many rows"):
        block_attention(*arrays, anchors, keep, scale=1.0, implementation="pallas_tpu")
    arrays = [x.astype(np.float16) for x in problem()[0]]
    with pytest.raises(Unsupported, match="neither bfloat16 nor float32"):
        block_attention(*arrays, *problem()[1:3], scale=1.0, implementation="pallas_tpu")


def test_memory_is_bounded_by_the_score_budget():
    def temporary(blocks, attention):
        arrays, anchors, keep, cotangent = problem(b=1, a=blocks, g=4, s=512, n=4, k=2, h=4)
        step = jax.jit(
            jax.grad(lambda q: jnp.sum(attention(q, *arrays[1:], anchors, keep, 0 * anchors, scale=1.0) * cotangent))
        )
        return step.lower(arrays[0]).compile().memory_analysis().temp_size_in_bytes

    chunked = functools.partial(xla.block_attention, max_scores=4 * 4 * 4 * 512)
    scores = 4 * 4 * 4 * 512  # bytes per block
    assert temporary(64, chunked) - temporary(16, chunked) < 48 * scores / 4
    assert temporary(64, block_attention) - temporary(16, block_attention) > 48 * scores


@pytest.mark.parametrize("attention", slow_kernels(BOUNDED))
def test_eight_devices_equal_one(attention):
    data = problem(b=4, n=4, k=2)
    want, want_grads = run(*data, 0.3, attention)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    arrays, anchors, keep, cotangent = data
    axes = [("batch", None, None, "heads", None), *2 * [("batch", None, "kv_heads", None)]]
    axes += 2 * [("batch", None, None, "kv_heads", None)]
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, sharding(names, x.shape, mesh)) for x, names in zip(arrays, axes, strict=True)]
        out, grads = run(arrays, anchors, keep, cotangent, 0.3, attention)
    np.testing.assert_allclose(out, want, atol=1e-6)
    for name, got, grad in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=2e-6, err_msg=name)


def test_refuses_what_does_not_fit():
    arrays, anchors, keep, _ = problem()
    with pytest.raises(ValueError, match="block_key is"):
        block_attention(*arrays[:3], arrays[3][:, :2], arrays[4], anchors, keep, scale=1.0)
    with pytest.raises(ValueError, match="no multiple"):
        block_attention(arrays[0][:, :, :, :3], *arrays[1:], anchors, keep, scale=1.0)
    with pytest.raises(ValueError, match="must be integers and keep"):
        block_attention(*arrays, anchors, keep.astype(np.int32), scale=1.0)
    with pytest.raises(ValueError, match="'flash' is not one of"):
        block_attention(*arrays, anchors, keep, scale=1.0, implementation="flash")
