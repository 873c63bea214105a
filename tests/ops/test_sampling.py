import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.ops.sampling import (
    Sampling,
    draw,
    first,
    largest,
    probabilities,
    sample,
    words,
)


def test_draw_inverts_the_cumulative_sum():
    weights = jnp.array([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    uniforms = np.array([0.0, 0.1, 0.1999, 0.2001, 0.69, 0.7001, 0.999, 1 - 2**-24], np.float32)
    tokens = draw(jnp.broadcast_to(weights, (8, 6)), words(jnp.asarray(uniforms)))
    assert tokens.tolist() == [1, 1, 1, 3, 3, 4, 4, 4]


def test_draw_never_gives_an_index_of_zero_weight_and_needs_no_normalisation():
    rng = np.random.default_rng(0)
    weights = rng.random((500, 300)).astype(np.float32) * (rng.random((500, 300)) < 0.1)
    weights[:, 7] += 1e-3
    uniforms = np.concatenate([np.zeros(100), np.full(100, 1 - 2**-24), rng.random(300)]).astype(np.float32)
    tokens = np.asarray(draw(jnp.asarray(weights * 37), words(jnp.asarray(uniforms))))
    assert (weights[np.arange(500), tokens] > 0).all()
    cdf = np.cumsum(weights.astype(np.float64), axis=1)
    expected = np.array([np.searchsorted(c, u * c[-1], side="right") for c, u in zip(cdf, uniforms, strict=True)])
    middle = slice(200, 500)
    assert (tokens[middle] == expected[middle]).mean() > 0.99  # float32 may differ at a boundary


def test_drawn_frequencies_follow_the_weights():
    """Chi-square over 2e5 draws from 40 classes: the 99.99 % quantile for 39 degrees of freedom is 85."""
    probs = np.random.default_rng(1).dirichlet(np.full(40, 0.5))
    probs = np.maximum(probs, 1e-4) / np.maximum(probs, 1e-4).sum()
    uniforms = jax.random.uniform(jax.random.key(0), (200_000,))
    tokens = jax.jit(jax.vmap(draw, (None, 0)))(jnp.asarray(probs, jnp.float32), words(uniforms))
    counts, expected = np.bincount(tokens, minlength=40), probs * 200_000
    assert ((counts - expected) ** 2 / expected).sum() < 85


def test_probabilities_at_temperatures():
    logits = np.random.default_rng(2).normal(size=(3, 9)).astype(np.float32) * 4
    temperature = np.array([0.0, 0.5, 2.0], np.float32)
    probs = np.asarray(probabilities(jnp.asarray(logits), jnp.asarray(temperature)))
    assert probs[0].tolist() == np.eye(9)[logits[0].argmax()].tolist()
    for b in (1, 2):
        want = np.exp(logits[b].astype(np.float64) / temperature[b])
        np.testing.assert_allclose(probs[b], want / want.sum(), rtol=2e-6)


def test_greedy_ties_go_to_the_first():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0]])
    assert sample(logits, Sampling.constant(0.0, 1), words(jnp.array([0.99]))).tolist() == [1]
    assert probabilities(logits, jnp.zeros(1)).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert Sampling.constant(0.0, 2).greedy and not Sampling.constant(0.7, 2).greedy


def test_draw_at_sizes_around_its_blocks():
    """Every index of positive weight is drawn by the uniform in the middle of its share, at any vocabulary size."""
    rng = np.random.default_rng(3)
    for size in (1, 2, 3, 15, 16, 17, 63, 65, 257):
        weights = rng.random(size) * (rng.random(size) < 0.6)
        weights[rng.integers(size)] = 0.5
        cdf = np.cumsum(weights) / weights.sum()
        index = np.flatnonzero(weights)
        middle = (cdf[index] + np.concatenate([[0], cdf])[index]) / 2
        tokens = jax.jit(draw)(jnp.asarray(np.tile(weights, (len(index), 1)), jnp.float32), words(jnp.asarray(middle)))
        assert tokens.tolist() == index.tolist()


def test_largest_is_the_first_argmax():
    logits = np.random.default_rng(4).integers(0, 3, (50, 7)).astype(np.float32)
    logits[0, 3] = np.nan
    assert largest(jnp.asarray(logits))[1:].tolist() == logits[1:].argmax(axis=-1).tolist()
    assert 0 <= int(largest(jnp.asarray(logits))[0]) < 7
    assert first(jnp.zeros((2, 5), bool)).tolist() == [5, 5]
