"""What is drawn against the softmax in float64: the probability of every token, from its borders in the uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops.sampling import (
    UNIT,
    Sampling,
    distribution,
    draw,
    is_below,
    sample,
    token_probabilities,
    words,
)
from dspark_jax.ops.speculative_verify import acceptance_probabilities
from dspark_jax.ops.speculative_verify.xla import next_distribution

TOLERANCE = 1e-6  # of the total variation
SIZES = [4096, pytest.param(151_936, marks=pytest.mark.slow)]

# It runs a few thousand times: optimised, in a seventh of the processor time.
many = jax.jit(jax.vmap(draw, (None, 0)), compiler_options={"xla_backend_optimization_level": 2})


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def variation(one: np.ndarray, other: np.ndarray) -> float:
    return 0.5 * float(np.abs(one - other).sum())


def tokens_at(weights: jax.Array, uniforms: np.ndarray) -> np.ndarray:
    """Tokens drawn from weights [V] by uniforms int64 [N], in units of 2^-60; a few thousand at a time."""
    uniforms = np.minimum(uniforms, 2**60 - 1)
    pairs = np.stack([uniforms >> 30, uniforms & (UNIT - 1)], axis=1).astype(np.int32)
    pairs = np.pad(pairs, ((0, -len(pairs) % 4096), (0, 0)))
    parts = [np.asarray(many(weights, part)) for part in np.split(pairs, len(pairs) // 4096)]
    return np.concatenate(parts)[: len(uniforms)]


def shares(weights: jax.Array) -> np.ndarray:
    """Probability [V] with which `draw` gives every token: all borders by bisection, to 2^-43."""
    exact = np.asarray(weights, np.float64)
    ends, ids, width = np.cumsum(exact / exact.sum()), np.arange(len(exact)), 2.0**-22
    low, high = (np.clip((ends + sign * width) * 2.0**60, 0, 2**60).astype(np.int64) for sign in (-1, 1))
    assert (tokens_at(weights, low)[low > 0] <= ids[low > 0]).all()
    assert (tokens_at(weights, high)[high < 2**60] > ids[high < 2**60]).all()
    while (high - low).max() > 2**17:
        middle = (low + high) // 2
        above = tokens_at(weights, middle) > ids
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.diff(np.where(high < 2**60, high, 2**60) / 2.0**60, prepend=0.0)


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_round_gives_the_targets_softmax(size: int) -> None:
    """The next token of a round of one draft: drawn, accepted or corrected, each with its exact probability."""
    rng = np.random.default_rng(0)
    target = (2 * rng.normal(size=size)).astype(np.float32)
    draft = (target + 3 * rng.normal(size=size)).astype(np.float32)  # much of its mass is in tokens of less than 1e-8
    sampling, rows = Sampling(jnp.ones(1)), [jnp.asarray(logits)[None] for logits in (draft, target)]
    scored = [jax.jit(distribution)(row, sampling)[0] for row in rows]
    drawn, truth = shares(scored[0]), softmax(target)
    assert variation(drawn, softmax(draft)) < TOLERANCE
    accept = np.asarray(acceptance_probabilities(*scored), np.float64)
    none, one = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
    following = next_distribution(jnp.stack([rows[1]] * 2, axis=1), rows[0][:, None], none, one, sampling)
    given = drawn * accept + (1 - np.sum(drawn * accept)) * shares(following[0])
    assert 0.1 < np.sum(drawn * accept) < 0.9
    assert variation(given, truth) < TOLERANCE


def test_a_recorded_uniform_is_taken_exactly() -> None:
    given = np.asarray([0.0, 2.0**-60, 2.0**-31, 1e-9, 0.1, 0.5, 0.7011786103248596, 1 - 2.0**-24, 1.0], np.float32)
    pairs = np.asarray(words(jnp.asarray(given)), np.float64)
    exact = pairs[:, 0] * 2.0**-30 + pairs[:, 1] * 2.0**-60
    assert ((exact <= given) & (given - exact < 2.0**-60)).all()
    assert (exact == given)[[0, 1, 2, 4, 5, 6, 7, 8]].all()  # 1e-9 has digits after 2^-60


def test_probabilities_are_compared_with_all_bits() -> None:
    """The uniforms just below a probability accept and that probability itself does not: at 1e-12 as at 1."""
    for probability in (1e-12, 1e-7, 0.3, 0.5, 1 - 2.0**-24, 1.0):
        value = jnp.float32(probability)
        border = int(float(value) * 2**60)
        for number, expected in ((border - 1, True), (border - 2**12, True), (border, False), (border + 1, False)):
            if number < 2**60:
                pair = jnp.asarray([number >> 30, number % UNIT], jnp.int32)
                assert bool(is_below(pair, value)) == expected, (probability, number - border)


def test_the_second_word_decides_inside_a_step_of_the_first() -> None:
    """Tokens that share less than 2^-30 of the mass with each other are drawn nevertheless, and no others."""
    weights = jnp.asarray([1.0, 1e-10, 2e-10, 1e-10, 0.0, 1.0], jnp.float32)
    fine = np.arange(0, UNIT, UNIT // 2048)
    pairs = [np.stack([np.full_like(fine, coarse), fine], axis=1) for coarse in (UNIT // 2 - 1, UNIT // 2)]
    drawn = [many(weights, pair.astype(np.int32)) for pair in pairs]
    counts = np.bincount(np.concatenate(drawn), minlength=6)
    assert counts[4] == 0 and counts[[0, 5]].min() > 1500
    np.testing.assert_allclose(counts[1:4], 2048 * np.asarray([1, 2, 1]) * 1e-10 * UNIT / 2, atol=2)


def test_the_ends_of_the_uniform_are_the_first_and_the_last_token() -> None:
    weights = jnp.zeros(700).at[3].set(1e-3).at[600].set(2.0).at[690].set(1e-3)
    for pair, token in (((0, 0), 3), ((0, UNIT - 1), 3), ((UNIT - 1, UNIT - 1), 690)):
        assert int(draw(weights, jnp.asarray(pair, jnp.int32))) == token


def test_no_floor_under_small_draft_probabilities() -> None:
    draft, target = jnp.asarray([1e-9, 1e-20, 0.0, 0.0]), jnp.asarray([5e-10, 2e-21, 0.0, 1e-3])
    np.testing.assert_allclose(acceptance_probabilities(draft, target), [0.5, 0.2, 0.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("temperature", (2e-5, 1e-4, 0.01, 0.7))
def test_tokens_are_drawn_and_scored_by_the_same_numbers(temperature: float) -> None:
    """At low temperatures too, where logits over the temperature have no digits left for their differences."""
    logits = np.asarray([[[3.0, 7.5, 7.5 + temperature, 7.5 - 2 * temperature]]], np.float32)
    exact = softmax((logits[0, 0].astype(np.float64) - logits.max()) / np.float32(temperature))
    sampling, tokens = Sampling(jnp.full(1, temperature)), jnp.arange(4)
    repeated = jnp.broadcast_to(logits, (1, 4, 4))
    scored = np.asarray(token_probabilities(repeated, tokens[None], sampling))[0]
    np.testing.assert_allclose(scored, exact, atol=3e-7)
    np.testing.assert_allclose(distribution(jnp.asarray(logits), sampling)[0, 0], scored, rtol=3e-7)
    # The border between tokens 1 and 2 of what is drawn lies where the scores put it.
    border = np.float64(scored[:2].sum())
    for offset, token in ((-1e-6, 1), (1e-6, 2)):
        pair = words(jnp.asarray([border + offset], jnp.float32))
        assert int(sample(jnp.asarray(logits[0]), sampling, pair)[0]) == token
