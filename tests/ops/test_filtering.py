"""Top-k, top-p and min-p against transformers' logits processors in PyTorch, and where those leave ties open."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark_jax.ops import sampling as sampling_module
from dspark_jax.ops.sampling import Sampling, allowed, draw, probabilities, sample, token_probabilities, words

distribution = jax.jit(sampling_module.distribution)


def oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """transformers' processors in the order in which its `generate` runs them, in float64."""
    scores = torch.from_numpy(logits.astype(np.float64))
    processors = [TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [MinPLogitsWarper(min_p)] if min_p else []
    for processor in processors:
        scores = processor(torch.zeros(len(logits), 1, dtype=torch.long), scores)
    return scores.softmax(-1).numpy()


SETTINGS = list(itertools.product((0.6, 1.7), (0, 1, 5, 90), (1.0, 0.95, 0.4), (0.0, 0.2)))


@pytest.mark.parametrize(("vocab", "sharpness"), [(50, 3.0), (700, 0.3), (700, 4.0)])
def test_against_transformers(vocab: int, sharpness: float) -> None:
    """All settings in one batch, beside each other. At 700 flat logits the border lies after the likeliest few."""
    rows = 3
    logits = sharpness * np.random.default_rng(0).normal(size=(len(SETTINGS), rows, vocab)).astype(np.float32)
    columns = [np.asarray(values, kind) for values, kind in zip(zip(*SETTINGS, strict=True), "fiff", strict=True)]
    ours = np.asarray(distribution(jnp.asarray(logits), Sampling(*map(jnp.asarray, columns))), np.float64)
    sizes = set()
    for row, setting in enumerate(SETTINGS):
        wanted = oracle(logits[row], *setting)
        np.testing.assert_array_equal(ours[row] > 0, wanted > 0, err_msg=str(setting))
        np.testing.assert_allclose(ours[row], wanted, rtol=2e-5, atol=1e-7, err_msg=str(setting))
        sizes |= set((wanted > 0).sum(axis=-1).tolist())
    assert 1 in sizes and max(sizes) == vocab and (vocab == 50 or sizes & set(range(66, vocab)))


@pytest.mark.parametrize("vocab", (8, 300))
def test_ties_go_to_the_lower_ids(vocab: int) -> None:
    """transformers keeps all tokens that tie with the k-th; here exactly k stay. So does the smallest top-p set."""
    half = vocab // 2
    flat = jnp.zeros((1, vocab))
    for setting in ({"top_k": jnp.asarray([half])}, {"top_p": jnp.asarray([0.5])}):
        weights = distribution(flat, Sampling(jnp.ones(1), **setting))[0]
        np.testing.assert_array_equal(weights > 0, np.arange(vocab) < half)
    steps = jnp.asarray([[1.0, 3.0, 1.0, 3.0, 1.0, -2.0, 1.0, 1.0]])  # two above, then five equals
    assert jnp.flatnonzero(distribution(steps, Sampling(jnp.ones(1), jnp.asarray([4])))[0]).tolist() == [0, 1, 2, 3]


def test_each_filter_sees_what_the_one_before_has_left() -> None:
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))

    def left(top_k: int, top_p: float, min_p: float) -> list[int]:
        sampling = Sampling(jnp.ones(1), jnp.asarray([top_k]), jnp.asarray([top_p]), jnp.asarray([min_p]))
        return jnp.flatnonzero(distribution(logits, sampling)[0]).tolist()

    assert left(0, 0.5, 0.0) == [0, 1]
    assert left(2, 0.5, 0.0) == [0]  # of 0.4 and 0.3 alone, the first is more than half
    assert left(0, 1.0, 0.49) == [0, 1, 2]
    assert left(0, 1.0, 0.51) == [0, 1]
    assert left(9, 1.0, 0.0) == [0, 1, 2, 3]


def test_requests_of_one_batch_do_not_see_each_other() -> None:
    """Each row of a mixed batch, greedy included, is what it is alone; filters that are off change nothing."""
    logits = 2 * jax.random.normal(jax.random.key(1), (5, 3, 80))
    heat, top_k = jnp.asarray([1.0, 0.0, 0.7, 1.3, 1.0]), jnp.asarray([0, 7, 0, 20, 0])
    top_p, min_p = jnp.asarray([1.0, 0.9, 0.8, 1.0, 1.0]), jnp.asarray([0.0, 0.3, 0.0, 0.05, 0.0])
    together = Sampling(heat, top_k, top_p, min_p)
    mixed = distribution(logits, together)
    for row in range(5):
        np.testing.assert_array_equal(distribution(logits[row : row + 1], together.take([row])), mixed[row : row + 1])
    np.testing.assert_array_equal(mixed[0], probabilities(logits[0], jnp.ones(())))
    np.testing.assert_array_equal(mixed[1], jax.nn.one_hot(jnp.argmax(logits[1], axis=-1), 80))
    tokens = jnp.argsort(-logits, axis=-1)[..., 4]
    scored = jax.jit(token_probabilities)(logits, tokens, together)
    np.testing.assert_allclose(scored, jnp.take_along_axis(mixed, tokens[..., None], axis=-1)[..., 0], rtol=1e-6)
    assert (scored == 0).any() and (scored > 0).any()


def test_tokens_are_drawn_from_the_filtered_distribution() -> None:
    logits = jax.random.normal(jax.random.key(2), (400, 3, 90))
    uniforms = words(jax.random.uniform(jax.random.key(3), (400, 3)))
    sampling = Sampling(jnp.full(400, 0.8), top_p=jnp.full(400, 0.5))
    tokens = jax.jit(jax.vmap(sample, in_axes=(1, None, 1), out_axes=1))(logits, sampling, uniforms)
    weights = distribution(logits, sampling)
    np.testing.assert_array_equal(tokens, jax.jit(draw)(weights, uniforms))
    assert (jnp.take_along_axis(weights, tokens[..., None], axis=-1) > 0).all()


def test_without_filters_nothing_is_computed_for_them() -> None:
    """The plain path's computation has no loop, no sort and no top-k; a greedy one has no exponential either."""
    logits = jnp.zeros((2, 64))

    def operations(sampling: Sampling) -> set[str]:
        traced = jax.make_jaxpr(lambda x, s: sample(x, s, jnp.zeros((2, 2), jnp.int32)))(logits, sampling)
        return set(re.findall(r"= ([a-z_]+)", str(traced)))

    costly, filters = {"while", "sort", "top_k"}, {"top_p": jnp.ones(2)}
    assert not operations(Sampling.constant(0.7, 2)) & costly
    assert operations(Sampling(jnp.ones(2), **filters)) & costly
    assert "exp" in operations(Sampling.constant(0.7, 2)) and "exp" not in operations(Sampling.constant(0.0, 2))
    assert allowed(logits, Sampling.constant(0.7, 2)) is logits
