import numpy as np
import pytest

from dspark_jax.evaluation.acceptance import (
    Acceptance,
    Counts,
    count,
    estimate,
    interval,
    macro_average,
    ratio,
    resample_weights,
)

# Two requests with G = 3. The first ends in an accepted stop token (draft 2, no bonus: trap 25); in the second a
# threshold leaves one draft, then none.
EMITTED = [np.array([4, 1, 2]), np.array([2, 1, 3])]
ACCEPTED = [np.array([3, 0, 2]), np.array([1, 0, 2])]
PROPOSED = [np.array([3, 3, 2]), np.array([1, 0, 3])]


def simulated(prompts: int, rng: np.random.Generator) -> Counts:
    """Prompts of very different quality and length: easy ones are also shorter. G = 4, everything verified."""
    quality = rng.choice([0.3, 0.9], prompts)
    rounds = np.where(quality > 0.5, rng.integers(5, 15, prompts), rng.integers(20, 40, prompts))
    accepted = [(rng.random((r, 4)) < q).cumprod(axis=1).sum(axis=1) for r, q in zip(rounds, quality, strict=True)]
    return count([a + 1 for a in accepted], accepted, [np.full(len(a), 4) for a in accepted], 4)


def test_counts_by_hand():
    counts = count(EMITTED, ACCEPTED, PROPOSED, 3)
    assert counts.tokens.tolist() == [7, 6]
    assert counts.rounds.tolist() == [3, 3]
    assert counts.accepted.tolist() == [[2, 2, 1], [2, 1, 0]]
    assert counts.proposed.tolist() == [[3, 3, 2], [2, 1, 1]]
    # Draft 3 of the round that stopped at draft 2 was never verified; draft 2 of the second request's first round was
    # cut; both follow an accepted draft and must not count as rejections.
    assert counts.reached.tolist() == [[3, 2, 1], [2, 1, 1]]


def test_conditional_and_survival_by_hand():
    result = estimate(count(EMITTED, ACCEPTED, PROPOSED, 3), 0, np.random.default_rng(0))
    assert result.tau == pytest.approx(13 / 6)
    assert (result.tokens, result.rounds) == (13, 6)
    np.testing.assert_allclose(result.conditional, [4 / 5, 3 / 3, 1 / 2])
    np.testing.assert_allclose(result.survival, [4 / 5, 3 / 4, 1 / 3])
    assert np.isnan(result.tau_interval).all()


def test_survival_is_the_product_of_the_conditionals_when_everything_is_verified():
    result = estimate(simulated(30, np.random.default_rng(3)), 0, np.random.default_rng(0))
    np.testing.assert_allclose(result.survival, np.cumprod(result.conditional), rtol=1e-12)


def test_bootstrap_equals_a_loop_over_resampled_prompts():
    counts = simulated(12, np.random.default_rng(5))
    result = estimate(counts, 40, np.random.default_rng(9))
    weights = resample_weights(12, 40, np.random.default_rng(9))
    tau, conditional, survival = [], [], []
    for row in weights:
        prompts = [i for i in range(12) for _ in range(row[i])]
        assert len(prompts) == 12
        tau.append(sum(counts.tokens[i] for i in prompts) / sum(counts.rounds[i] for i in prompts))
        accepted = sum(counts.accepted[i] for i in prompts)
        conditional.append(accepted / sum(counts.reached[i] for i in prompts))
        survival.append(accepted / sum(counts.proposed[i] for i in prompts))
    np.testing.assert_allclose(result.tau_resamples, tau, rtol=1e-12)
    np.testing.assert_allclose(result.tau_interval, np.quantile(tau, [0.025, 0.975]), rtol=1e-12)
    np.testing.assert_allclose(
        result.conditional_interval, np.quantile(conditional, [0.025, 0.975], axis=0), rtol=1e-12
    )
    np.testing.assert_allclose(result.survival_interval, np.quantile(survival, [0.025, 0.975], axis=0), rtol=1e-12)


def test_resampling_is_drawing_with_replacement():
    weights = resample_weights(7, 20000, np.random.default_rng(1))
    indices = np.random.default_rng(2).integers(0, 7, (20000, 7))
    drawn = np.stack([np.sum(indices == i, axis=1) for i in range(7)], axis=1)
    # Standard errors: of a mean 0.0066, of a covariance about 0.009.
    np.testing.assert_allclose(weights.mean(axis=0), drawn.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(np.cov(weights.T), np.cov(drawn.T), atol=0.07)


def test_the_same_seed_gives_the_same_interval():
    counts = simulated(12, np.random.default_rng(5))
    first, second, other = (estimate(counts, 200, np.random.default_rng(seed)).tau_interval for seed in (1, 1, 2))
    assert first.tolist() == second.tolist() != other.tolist()


def test_intervals_cover_the_truth():
    """Of 300 experiments with 64 prompts, about 95 % of the intervals must hold the long-run ratio (+-4 sigma)."""
    rng = np.random.default_rng(11)
    expected = {q: sum(q**k for k in range(5)) for q in (0.3, 0.9)}  # 1 + q + q^2 + ...: tokens of a round
    lengths = {0.3: 29.5, 0.9: 9.5}
    truth = sum(expected[q] * lengths[q] for q in lengths) / sum(lengths.values())
    inside = 0
    for _ in range(300):
        low, high = estimate(simulated(64, rng), 300, rng).tau_interval
        inside += low <= truth <= high
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 300) <= inside / 300 <= 1.0 - 0.01


def test_macro_average_counts_every_set_alike_and_resamples_within_sets():
    rng = np.random.default_rng(4)
    small, large = (estimate(simulated(n, rng), 4000, rng) for n in (10, 160))
    tau, bounds = macro_average([small, large])
    assert tau == pytest.approx((small.tau + large.tau) / 2)
    spread = np.hypot(small.tau_resamples.std(), large.tau_resamples.std()) / 2
    np.testing.assert_allclose(bounds[1] - bounds[0], 2 * 1.96 * spread, rtol=0.1)


def test_prompts_without_rounds():
    """A stop token straight from the prefill leaves a prompt without rounds; it is counted but weighs nothing."""
    nothing = np.zeros(0, np.int64)
    counts = count([*EMITTED, nothing], [*ACCEPTED, nothing], [*PROPOSED, nothing], 3)
    result = estimate(counts, 500, np.random.default_rng(0))
    assert result.tau == pytest.approx(13 / 6)
    assert np.isfinite(result.tau_interval).all()  # some resamples hold only the empty prompt
    empty = estimate(count([nothing] * 3, [nothing] * 3, [nothing] * 3, 3), 50, np.random.default_rng(0))
    assert np.isnan(empty.tau) and np.isnan(empty.tau_interval).all() and np.isnan(empty.conditional).all()
    assert macro_average([result, empty])[0] == result.tau
    assert np.isnan(macro_average([empty])[0]) and np.isnan(macro_average([])[1]).all()


def test_one_prompt_has_no_interval():
    def one(n: int) -> Acceptance:
        return estimate(simulated(n, np.random.default_rng(n)), 100, np.random.default_rng(0))

    assert np.isnan(one(1).tau_interval).all() and np.isfinite(one(1).tau)
    tau, bounds = macro_average([one(1), one(9)])
    assert np.isfinite(tau) and np.isnan(bounds).all()


def test_turns_of_a_conversation_are_one_prompt():
    counts = count(EMITTED, ACCEPTED, PROPOSED, 3)
    joined = counts.grouped(np.array([1, 1]), 3)
    assert joined.tokens.tolist() == [0, 13, 0]
    assert joined.accepted.tolist() == [[0, 0, 0], [4, 3, 1], [0, 0, 0]]


def test_interval_leaves_out_undefined_draws():
    draws = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    np.testing.assert_allclose(interval(draws)[:, 0], [1.05, 2.95])
    assert np.isnan(interval(draws)[:, 1]).all()
    assert np.isnan(ratio(np.array([1, 2]), np.array([2, 0]))).tolist() == [False, True]
