import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import platform
from dspark_jax.config import MeshConfig
from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.ops.markov_sample import markov_sample, pallas_gpu, pallas_tpu
from dspark_jax.ops.sampling import UNIT, Sampling, distribution, draw, words
from dspark_jax.sharding import make_mesh

G, B, V, R = 4, 3, 37, 6


def problem(rank=R, v=V, b=B):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(G, b, v)) * 2
    w1, w2 = rng.normal(size=(v, rank)), rng.normal(size=(v, rank)) * rank**-0.5
    return base, w1, w2, np.resize([5, 36, 0], b), rng.random((G, b))


KERNELS = functools.partial(pallas_gpu.markov_sample, parts=3, tile=16)  # parts of two tiles, the last one not full
TPU_KERNEL = functools.partial(pallas_tpu.markov_sample, sizes=pallas_tpu.Sizes(256))
STREAMED = functools.partial(pallas_tpu.markov_sample, sizes=pallas_tpu.Sizes(256, held=1))  # W2 through a ring


@pytest.mark.parametrize(
    ("run", "sizes"),
    [
        (markov_sample, (R, V)),
        (KERNELS, (16, 93)),
        (KERNELS, (16, 37)),
        pytest.param(TPU_KERNEL, (128, 640), marks=pytest.mark.slow),
        pytest.param(STREAMED, (256, 1152), marks=pytest.mark.slow),
        pytest.param(pallas_tpu.markov_sample, (128, 2048), marks=pytest.mark.slow),
        pytest.param(pallas_tpu.markov_sample, (128, 128), marks=pytest.mark.slow),
    ],
    ids=["xla", "gpu", "small on gpu", "tpu", "tpu, streamed", "tpu, its own sizes", "tpu, one register"],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_against_a_float64_loop(temperature, run, sizes):
    base, w1, w2, anchors, uniforms = problem(*sizes)
    f32 = [jnp.asarray(x, jnp.float32) for x in (base, w1, w2)]
    sampling = Sampling.constant(temperature, B)
    tokens, logits = jax.jit(run)(*f32, jnp.asarray(anchors), words(jnp.asarray(uniforms)), sampling)
    for b in range(B):
        previous = anchors[b]
        for k in range(G):
            biased = base[k, b] + w2 @ w1[previous]
            np.testing.assert_allclose(logits[k, b], biased, atol=1e-5)
            if temperature == 0.0:
                expected = biased.argmax()
            else:
                weights = np.exp((biased - biased.max()) / temperature)
                cdf = np.cumsum(weights) / weights.sum()
                expected = np.argmax(cdf > uniforms[k, b])
            assert tokens[k, b] == expected
            previous = expected


def given(b, rank, v, dtype=jnp.bfloat16) -> Any:
    """Arguments for the kernels: greedy requests beside others, and tokens of no probability."""
    base, w1, w2, anchors, uniforms = problem(rank, v, b)
    base[:, :, ::3] = -np.inf
    base[1:3, :, : min(256, v // 2)] = -np.inf  # all of a tile, for some drafts
    arrays = jnp.asarray(base, jnp.float32), jnp.asarray(w1, dtype), jnp.asarray(w2, dtype)
    heat = jnp.resize(jnp.asarray([0.0, 1.0, 0.3]), b)
    return *arrays, jnp.asarray(anchors), words(jnp.asarray(uniforms)), Sampling(heat)


def assert_same(found, arguments):
    """Tokens of the definition, and its logits."""
    tokens, logits = jax.jit(functools.partial(markov_sample, implementation="xla"))(*arguments)
    np.testing.assert_array_equal(found[0], tokens)
    np.testing.assert_allclose(found[1], logits, atol=1e-5)


@pytest.mark.parametrize(
    ("run", "sizes"),
    [
        (KERNELS, (3, 16, 93)),
        pytest.param(TPU_KERNEL, (3, 128, 640), marks=pytest.mark.slow),
        (STREAMED, (1, 128, 1152)),
        pytest.param(STREAMED, (19, 256, 1152), marks=pytest.mark.slow),
    ],
    ids=["gpu", "tpu", "tpu, one request", "tpu, many requests"],
)
def test_kernels_take_greedy_requests_beside_others_and_bfloat16(run, sizes):
    arguments = given(*sizes)
    assert_same(jax.jit(run)(*arguments), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("run", [TPU_KERNEL, STREAMED], ids=["held", "streamed"])
def test_the_kernel_for_tpus_reads_nothing_that_was_not_written(run, strict_tpu):
    """Interpreted as a TPU works: unset memory is NaN, reads beyond an array fail, races are found."""
    arguments = given(3, 256, 1152)
    assert_same(jax.jit(run)(*arguments), arguments)
    assert not strict_tpu()


@pytest.mark.slow
def test_the_kernel_for_tpus_on_eight_devices_equals_one():
    """Requests are split; those that cannot be, and a split vocabulary, are left to others."""
    arguments = given(8, 128, 640)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4, tensor=1))):
        found = jax.jit(TPU_KERNEL)(*arguments)
        with pytest.raises(Unsupported, match="requests are not split evenly"):
            TPU_KERNEL(*given(3, 128, 640))
    assert_same(found, arguments)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))), pytest.raises(Unsupported, match="is split"):
        TPU_KERNEL(*arguments)


@pytest.mark.parametrize(
    ("run", "v"),
    [
        (markov_sample, 640),
        (functools.partial(pallas_gpu.markov_sample, parts=3, tile=128), 640),
        (functools.partial(pallas_gpu.markov_sample, parts=2, tile=128), 5000),  # in three parts: two are too long
        (TPU_KERNEL, 640),
    ],
    ids=["xla", "gpu", "gpu, many tokens", "tpu"],
)
def test_both_words_of_a_uniform_count(run, v):
    """Of three tokens the second begins at 1/3 = 357913941.33 / 2^30; the first uniform is just below, the next above.
    Of equal logits a greedy request takes the first."""
    base = np.full((1, 4, v), -np.inf, np.float32)
    base[:, :, [255, 256, 600]] = 0.0
    first, shares = UNIT // 3, np.array([0.3, 0.36, 0.9, 0.9])
    uniforms = jnp.asarray(np.stack([np.full(4, first), shares * UNIT], axis=-1)[None], jnp.int32)
    zeros = jnp.zeros((v, 128))
    heat = Sampling(jnp.asarray([1.0, 1.0, 0.5, 0.0]))
    tokens, _ = jax.jit(run)(jnp.asarray(base), zeros, zeros, jnp.zeros((4,), int), uniforms, heat)
    assert tokens.tolist() == [[255, 256, 256, 255]]


@pytest.mark.parametrize("kernels", [KERNELS, TPU_KERNEL], ids=["gpu", "tpu"])
def test_kernels_leave_filters_to_others(kernels):
    *arrays, sampling = given(3, 128, 640)
    with pytest.raises(Unsupported, match="there are filters"):
        kernels(*arrays, Sampling(sampling.temperature, jnp.asarray([3, 3, 3])))


def test_kernels_refuse_other_sizes():
    base, w1, w2, *rest = given(3, 128, 640)
    for (v, r), reason in {(640, 96): "the rank is no multiple of 128", (600, 128): "the vocabulary is no mul"}.items():
        with pytest.raises(Unsupported, match=reason):
            markov_sample(base[:, :, :v], w1[:v, :r], w2[:v, :r], *rest, implementation="pallas_tpu")
    with pytest.raises(Unsupported, match="neither both bfloat16 nor both float32"):
        TPU_KERNEL(base, w1.astype(jnp.float32), w2, *rest)


@pytest.mark.parametrize(("shared", "requests", "fits"), [(227, 256, True), (163, 256, False), (99, 64, True)])
def test_a_step_fits_into_a_card_s_shared_memory(shared, requests, fits, monkeypatch):
    """Rank 256 in bfloat16: rows of W1 for all requests, W2 as often as it is fetched ahead, and a tile's logits."""
    monkeypatch.setattr(platform, "gpu_shared_memory", lambda: shared << 10)
    sizes = pallas_gpu._fitting(requests * 512, 512, requests)
    assert bool(sizes) == fits
    for tile, stages in sizes:
        assert requests * 512 + (stages - 1) * tile * 512 + 4 * requests * tile < shared << 10
    assert not fits or sizes[0] == max(sizes)
    if not fits:
        arrays = jnp.zeros((1, requests, 640)), *[jnp.zeros((640, 256), jnp.bfloat16)] * 2, jnp.zeros(requests, int)
        heat = Sampling.constant(1.0, requests)
        with pytest.raises(Unsupported, match="requests and rank are too many for this card"):
            pallas_gpu.markov_sample(*arrays, jnp.zeros((1, requests, 2), int), heat)


def test_filters_cut_the_biased_distribution():
    base, w1, w2, anchors, uniforms = (jnp.asarray(x, jnp.float32) for x in problem())
    heat = jnp.asarray([0.7, 1.0, 0.0])
    sampling = Sampling(heat, jnp.asarray([3, 0, 0]), jnp.asarray([1.0, 0.6, 1.0]), jnp.asarray([0.0, 0.1, 0.5]))
    tokens, logits = jax.jit(markov_sample)(base, w1, w2, anchors.astype(int), words(uniforms), sampling)
    for k, weights in enumerate(jax.jit(jax.vmap(distribution, (0, None)))(logits, sampling)):
        assert 1 <= (weights[0] > 0).sum() <= 3 and (weights[1] > 0).sum() < V and (weights[2] > 0).sum() == 1
        assert tokens[k].tolist() == draw(weights, words(uniforms)[k]).tolist()
        previous = anchors.astype(int) if k == 0 else tokens[k - 1]
        np.testing.assert_allclose(logits[k], base[k] + w1[previous] @ w2.T, atol=1e-5)


def test_rows_stored_in_lanes_give_the_same():
    base, w1, w2, anchors, uniforms = (jnp.asarray(x) for x in problem(rank=256))
    uniforms = words(uniforms)
    flat = markov_sample(base, w1, w2, anchors, uniforms, Sampling.constant(1.0, B))
    lanes = markov_sample(base, w1.reshape(V, 2, 128), w2, anchors, uniforms, Sampling.constant(1.0, B))
    for ours, theirs in zip(lanes, flat, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bad_shapes_and_names_are_refused():
    base, w1, w2, anchors, uniforms = (jnp.asarray(x) for x in problem())
    with pytest.raises(ValueError, match=r"uniforms has shape \(4, 3\), expected \(4, 3, 2\)"):
        markov_sample(base, w1, w2, anchors, uniforms, Sampling.constant(1.0, B))
    uniforms = words(uniforms)
    with pytest.raises(ValueError, match=r"w1 has shape \(36, 6\), expected \(37, 6\)"):
        markov_sample(base, w1[1:], w2, anchors, uniforms, Sampling.constant(1.0, B))
    with pytest.raises(ValueError, match=r"'cuda' is not one of"):
        markov_sample(base, w1, w2, anchors, uniforms, Sampling.constant(1.0, B), implementation="cuda")
