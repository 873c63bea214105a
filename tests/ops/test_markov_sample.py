import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.ops.markov_sample import markov_sample, pallas_gpu
from dspark_jax.ops.sampling import Sampling, distribution, draw, words

G, B, V, R = 4, 3, 37, 6


def problem(rank=R, v=V):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(G, B, v)) * 2
    w1, w2 = rng.normal(size=(v, rank)), rng.normal(size=(v, rank)) * rank**-0.5
    return base, w1, w2, np.array([5, 36, 0]), rng.random((G, B))


KERNELS = functools.partial(pallas_gpu.markov_sample, parts=3, tile=16)  # parts of two tiles, the last one not full


@pytest.mark.parametrize(
    ("run", "sizes"), [(markov_sample, (R, V)), (KERNELS, (16, 93)), (KERNELS, (16, 37))], ids=["xla", "gpu", "small"]
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


def test_kernels_take_greedy_requests_beside_others_and_bfloat16():
    base, w1, w2, anchors, uniforms = problem(16, 93)
    arrays = (jnp.asarray(base, jnp.float32), *(jnp.asarray(x, jnp.bfloat16) for x in (w1, w2)))
    rest = jnp.asarray(anchors), words(jnp.asarray(uniforms)), Sampling(jnp.asarray([0.0, 1.0, 0.3]))
    for ours, theirs in zip(jax.jit(KERNELS)(*arrays, *rest), jax.jit(markov_sample)(*arrays, *rest), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(Unsupported, match="there are filters"):
        KERNELS(*arrays, *rest[:2], Sampling(rest[2].temperature, jnp.asarray([3, 3, 3])))
    with pytest.raises(Unsupported, match="part of the vocabulary is too long"):
        pallas_gpu.markov_sample(jnp.zeros((1, 1, 5000)), jnp.zeros((5000, 16)), jnp.zeros((5000, 16)), *rest, parts=2)


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
