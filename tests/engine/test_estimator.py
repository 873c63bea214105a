"""The running acceptance estimate against a loop in float64, and what it may and may not depend on."""

import jax
import numpy as np
import pytest

from dspark_jax.engine.estimator import AcceptanceEstimate, conditional, empty_estimate, restart, survival, update

BATCH, SIZE = 3, 4
SETTINGS = {"strength": 2.5, "discount": 0.8, "all_discount": 0.9, "prior": 0.3}


def rounds(count: int, seed: int) -> tuple[np.ndarray, ...]:
    """Random rounds [count, BATCH]: some drafts are not scheduled, some requests idle, some slots taken anew."""
    rng = np.random.default_rng(seed)
    proposed = rng.integers(0, SIZE + 1, (count, BATCH))
    accepted = np.minimum(rng.integers(0, SIZE + 1, (count, BATCH)), proposed)
    return proposed, accepted, rng.random((count, BATCH)) < 0.7, rng.random((count, BATCH)) < 0.15


def by_hand(proposed: np.ndarray, accepted: np.ndarray, active: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Conditional acceptance [BATCH, SIZE] after the rounds, observation by observation."""
    s = SETTINGS
    own = [[[0.0, 0.0] for _ in range(SIZE)] for _ in range(BATCH)]
    everyone = [[0.0, 0.0] for _ in range(SIZE)]
    for p, a, on, new in zip(proposed, accepted, active, fresh, strict=True):
        for b in range(BATCH):
            if new[b]:
                own[b] = [[0.0, 0.0] for _ in range(SIZE)]
        if on.any():
            everyone = [[s["all_discount"] * v for v in pair] for pair in everyone]
        for b in range(BATCH):
            if not on[b]:
                continue
            own[b] = [[s["discount"] * v for v in pair] for pair in own[b]]
            for k in range(1, p[b] + 1):
                for pair in (own[b][k - 1], everyone[k - 1]):
                    pair[0] += a[b] >= k
                    pair[1] += 1
                if a[b] < k:
                    break
    out = np.zeros((BATCH, SIZE))
    for b in range(BATCH):
        for k in range(SIZE):
            mean = (everyone[k][0] + s["prior"]) / (everyone[k][1] + 1)
            out[b, k] = (own[b][k][0] + s["strength"] * mean) / (own[b][k][1] + s["strength"])
    return out


def run(*history: np.ndarray) -> AcceptanceEstimate:
    state = empty_estimate(BATCH, SIZE, **SETTINGS)
    for proposed, accepted, active, fresh in zip(*history, strict=True):
        state = update(restart(state, fresh), proposed, accepted, active)
    return state


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_loop_over_observations(seed: int):
    history = rounds(40, seed)
    expected = by_hand(*history)
    state = run(*history)
    # Sums of 40 float32 terms.
    np.testing.assert_allclose(conditional(state), expected, rtol=1e-5)
    np.testing.assert_allclose(survival(state), np.cumprod(expected, axis=1), rtol=1e-5)


def test_what_a_confidence_head_expects_counts_in_fractions_of_a_round():
    """One request, by hand: survivals .8, .4 are 1 and .8 rounds that reach, .8 and .4 that pass the two positions."""
    state = empty_estimate(2, 2, strength=0.5, discount=0.9, all_discount=0.8, prior=0.25)
    on, none = np.array([True, False]), np.zeros(2, int)
    state = update(state, none, none, on, np.array([[0.8, 0.4], [1.0, 1.0]], np.float32))
    state = update(state, none, none, on, np.array([[0.5, 0.1], [1.0, 1.0]], np.float32))
    reached, accepted = np.array([0.9 + 1, 0.9 * 0.8 + 0.5]), np.array([0.9 * 0.8 + 0.5, 0.9 * 0.4 + 0.1])
    everyone = (np.array([0.8 * 0.8 + 0.5, 0.8 * 0.4 + 0.1]) + 0.25) / (np.array([0.8 + 1, 0.8 * 0.8 + 0.5]) + 1)
    np.testing.assert_allclose(conditional(state)[0], (accepted + 0.5 * everyone) / (reached + 0.5), rtol=1e-6)
    np.testing.assert_allclose(conditional(state)[1], everyone, rtol=1e-6)


def test_before_any_round_everyone_has_the_prior():
    state = empty_estimate(BATCH, SIZE, **SETTINGS)
    np.testing.assert_allclose(
        survival(state), np.broadcast_to(0.3 ** np.arange(1, SIZE + 1), (BATCH, SIZE)), rtol=1e-6
    )


def test_a_new_request_is_average_and_others_stay():
    state = run(*rounds(20, 3))
    again = restart(state, np.array([False, True, False]))
    everyone = (np.asarray(state.all_accepted) + 0.3) / (np.asarray(state.all_reached) + 1)
    np.testing.assert_allclose(conditional(again)[1], everyone, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(conditional(again))[[0, 2]], np.asarray(conditional(state))[[0, 2]])


def test_what_was_not_verified_is_no_observation():
    """Whatever an unscheduled or idle position would have shown, the estimate is the same."""
    state = run(*rounds(10, 4))
    proposed, accepted = np.array([2, 0, 4]), np.array([2, 0, 1])
    after = update(state, proposed, accepted, np.array([True, True, False]))
    # Nothing beyond draft 2 of the first request was seen: those positions only faded towards the average.
    np.testing.assert_allclose(after.reached[0, 2:], 0.8 * np.asarray(state.reached)[0, 2:], rtol=1e-6)
    np.testing.assert_allclose(after.reached[1], 0.8 * np.asarray(state.reached)[1], rtol=1e-6)
    np.testing.assert_array_equal(after.reached[2], state.reached[2])
    other = update(state, proposed, np.array([2, 0, 4]), np.array([True, True, False]))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_position_given_up_is_tried_again():
    """After a run of rejections nothing is verified; the estimate returns to the prior instead of staying low."""
    state = empty_estimate(1, 1, prior=0.5)
    on = np.array([True])
    for _ in range(300):
        state = update(state, np.array([1]), np.array([0]), on)
    low = float(survival(state)[0, 0])
    skip = jax.jit(lambda s: jax.lax.fori_loop(0, 3000, lambda _, s: update(s, np.array([0]), np.array([0]), on), s))
    assert low < 0.01
    np.testing.assert_allclose(survival(skip(state)), 0.5, atol=1e-3)


def test_it_learns_rates_and_differences_between_requests():
    """Two requests with conditional acceptance 0.9 and 0.3: each estimate ends near its own rate."""
    rng = np.random.default_rng(0)
    rates = np.array([0.9, 0.3])
    state = empty_estimate(2, SIZE, strength=4.0, discount=1.0)
    step = jax.jit(update)
    for _ in range(400):
        accepted = (rng.random((2, SIZE)) < rates[:, None]).cumprod(axis=1).sum(axis=1)
        state = step(state, np.array([SIZE, SIZE]), accepted, np.array([True, True]))
    # The first position is reached in all rounds: standard error 0.023; the fourth by the second request in about 11.
    np.testing.assert_allclose(conditional(state)[:, 0], rates, atol=0.08)
    assert np.all(conditional(state)[0] > conditional(state)[1])
