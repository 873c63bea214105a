import json
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.evaluation.calibration import (
    GRID,
    PositionCalibration,
    calibrate,
    chance_error,
    expected_calibration_error,
    fit_bias,
    fit_temperatures,
    score,
    score_conditional,
    score_survival,
    survival_probabilities,
    weighted_mean,
)


def padded(rows: list[list[float]], width: int, fill: float) -> np.ndarray:
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows])


def close(value: float, expected: float | None, tolerance: float = 1e-12) -> bool:
    """null in the golden file means not defined."""
    return bool(np.isnan(value)) if expected is None else abs(value - expected) <= tolerance


@pytest.mark.parametrize("number", range(3))
def test_scores_equal_the_reference(golden: Path, number: int):
    case = json.loads((golden / "unit/confidence_metrics.json").read_text())["cases"][number]
    updates, size = case["updates"], case["block_size"]
    # Beyond what was verified the logits would do harm.
    confidence = padded([update["confidence_logits"] for update in updates], size, -50.0)
    accepted = np.array([int(sum(update["targets"])) for update in updates])
    proposed = np.array([len(update["targets"]) for update in updates])
    bins = {"bins": case["num_coarse_bins"], "fine_bins": case["num_fine_bins"]}
    # The file holds the reference's own probabilities (sigmoid in float32): with those the scores are exact.
    probabilities = padded([update["probs"] for update in updates], size, np.nan)
    known = proposed[:, None] > np.arange(size)
    np.testing.assert_allclose(survival_probabilities(confidence)[known], probabilities[known], rtol=1e-6)
    scores = [score(probabilities[known[:, k], k], accepted[known[:, k]] > k, **bins) for k in range(size)]
    for one, expected in zip(scores, case["per_position"], strict=True):
        assert one.weight == expected["total_weight"]
        names = {"ece": one.ece, "auc": one.auc, "brier": one.brier}
        names |= {"pred_mean": one.predicted, "target_mean": one.observed}
        assert all(close(value, expected[name]) for name, value in names.items()), (names, expected)
        bars = one.reliability
        assert len(bars.weight) == len(expected["reliability"])
        for i, bar in enumerate(expected["reliability"]):
            np.testing.assert_allclose([bars.lower[i], bars.upper[i]], bar["range"], atol=1e-12)
            np.testing.assert_allclose(bars.predicted[i], bar["avg_pred"], atol=1e-12)
            np.testing.assert_allclose(bars.observed[i], bar["avg_target"], atol=1e-12)
            assert bars.weight[i] == bar["weight"]
    summary = {"ece": "ece_mean", "auc": "auc_mean", "brier": "brier_mean", "predicted": "pred_mean"}
    for name, key in {**summary, "observed": "target_mean"}.items():
        assert close(weighted_mean(scores, name), case["summary"][key])
    # From the logits, with the sigmoid in float64 as well, nothing moves by more than float32 rounding.
    for one, other in zip(calibrate(confidence, accepted, proposed, **bins), scores, strict=True):
        assert one.weight == other.weight
        for name in ("ece", "brier", "predicted", "observed"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-6)


def test_scores_against_a_loop():
    rng = np.random.default_rng(0)
    logits, accepted, proposed = rng.normal(1, 2, (200, 3)), rng.integers(0, 4, 200), np.full(200, 3)
    proposed[::5] = accepted[::5]
    for k, one in enumerate(calibrate(logits, accepted, proposed, bins=10, fine_bins=10**7)):
        rows = [r for r in range(200) if proposed[r] > k]
        p = [float(np.prod(1 / (1 + np.exp(-logits[r, : k + 1])))) for r in rows]
        t = [float(accepted[r] > k) for r in rows]
        error = 0.0
        for b in range(10):
            inside = [i for i in range(len(p)) if b / 10 <= p[i] < (b + 1) / 10]
            error += abs(sum(p[i] - t[i] for i in inside)) / len(p)
        pairs = [
            (x > y) + 0.5 * (x == y) for x, a in zip(p, t, strict=True) if a for y, b in zip(p, t, strict=True) if not b
        ]
        assert one.ece == pytest.approx(error, abs=1e-12)
        assert one.auc == pytest.approx(np.mean(pairs), abs=1e-4)  # 10^7 bins leave hardly any ties
        assert one.brier == pytest.approx(np.mean(np.square(np.subtract(p, t))), abs=1e-12)


def test_a_calibrated_head_has_almost_no_error():
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 1.5, (100_000, 2))
    accepted = (rng.random((100_000, 2)) < 1 / (1 + np.exp(-logits))).cumprod(axis=1).sum(axis=1)
    proposed = np.full(100_000, 2)
    assert all(one.ece < 0.01 for one in calibrate(logits, accepted, proposed))  # about 0.003 by chance alone
    assert all(one.ece > 0.05 for one in calibrate(2 * logits, accepted, proposed))


def test_extreme_logits_and_empty_positions():
    logits = np.array([[800.0, -800.0], [800.0, 0.0]])
    first, second = calibrate(logits, np.array([1, 1]), np.array([1, 1]))
    assert first.predicted == pytest.approx(1.0) and first.ece == pytest.approx(0.0, abs=1e-7)
    assert np.isnan(first.auc)  # nothing was rejected
    assert isinstance(second, PositionCalibration) and second.weight == 0 and np.isnan(second.ece)
    assert np.isnan(weighted_mean([second], "ece"))


def simulated(rounds: int, rng: np.random.Generator, scale: np.ndarray, bias: float = 0.0) -> tuple[np.ndarray, ...]:
    """Logits, accepted drafts and usable positions; draft k survives with probability sigmoid(logit / scale + bias)."""
    size = len(scale)
    logits = rng.normal(1.0, 2.0, (rounds, size))
    survives = rng.random((rounds, size)) < 1 / (1 + np.exp(-(logits / scale + bias)))
    usable = np.where(rng.random(rounds) < 0.2, rng.integers(1, size + 1, rounds), size)
    return logits, np.minimum(survives.cumprod(axis=1).sum(axis=1), usable), usable


def ece_loop(predicted: list[float], observed: list[bool], bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = [i for i, p in enumerate(predicted) if b / bins <= p < (b + 1) / bins]
        if inside:
            mean = sum(predicted[i] for i in inside) / len(inside)
            share = sum(observed[i] for i in inside) / len(inside)
            total += len(inside) / len(predicted) * abs(mean - share)
    return total


@pytest.mark.parametrize("exact", [True, False])
def test_temperatures_equal_a_loop(exact: bool):
    """The paper's definition, spelled out: position after position, temperature after temperature, bin after bin."""
    logits, accepted, usable = simulated(300, np.random.default_rng(2), np.array([1.0, 2.5, 0.5]))
    found = fit_temperatures(logits, accepted, usable, bins=5, exact=exact)
    chosen: list[float] = []
    for k in range(3):
        errors = {}
        rows = [r for r in range(300) if usable[r] >= k + 1]
        for t in 10 ** np.linspace(-1, 1, 41):
            scales = [*chosen, t]
            p = [float(np.prod([1 / (1 + np.exp(-logits[r, i] / scales[i])) for i in range(k + 1)])) for r in rows]
            errors[t] = ece_loop(p, [bool(accepted[r] >= k + 1) for r in rows], 5)
        least = min(errors.values())
        allowed = least if exact else 1.1 * least + 0.0005
        # One ulp of slack: sums of 300 numbers in another order.
        good = [t for t, error in errors.items() if error <= allowed + 1e-12]
        chosen.append(min(good, key=lambda t: abs(np.log(t))))
    np.testing.assert_allclose(found, chosen, rtol=1e-9)
    assert found.min() < 1 < found.max()


def test_temperatures_are_found_again():
    """With many rounds and a head whose logits are too large by known factors, STS finds those factors."""
    truth = np.array([1.0, 2.5119, 0.6310])  # grid points
    rng = np.random.default_rng(5)
    fit, held_out = simulated(60_000, rng, truth), simulated(60_000, rng, truth)
    temperatures = fit_temperatures(*fit, exact=True)
    np.testing.assert_allclose(temperatures, truth, rtol=0.3)  # two grid steps
    logits, accepted, usable = held_out
    before = score_survival(survival_probabilities(logits), accepted, usable)
    after = score_survival(survival_probabilities(logits, temperatures), accepted, usable)
    assert before[1].ece > 0.06 and before[2].ece > 0.02
    assert all(one.ece < 0.012 for one in after)  # about 0.004 by chance alone


def test_a_position_without_rounds_keeps_its_temperature():
    logits, accepted, usable = simulated(100, np.random.default_rng(0), np.array([3.0, 1.0]))
    found = fit_temperatures(logits, np.minimum(accepted, 1), np.minimum(usable, 1), exact=True)
    assert found[0] != 1.0 and found[1] == 1.0
    assert fit_temperatures(np.zeros((0, 2)), np.zeros(0), np.zeros(0)).tolist() == [1.0, 1.0]


def test_the_grid_is_that_of_the_servers_script():
    assert len(GRID) == 41 and GRID[0] == pytest.approx(0.1) and GRID[-1] == pytest.approx(10)
    assert GRID[20] == 1.0  # exactly: a head that needs nothing stays as it is


def test_bias_is_found_again():
    rng = np.random.default_rng(8)
    logits, accepted, usable = simulated(20_000, rng, np.ones(3), bias=-0.4)
    assert fit_bias(logits, accepted, usable) == pytest.approx(-0.4, abs=0.1)
    assert fit_bias(*simulated(20_000, rng, np.ones(3))) == pytest.approx(0.0, abs=0.1)
    assert fit_bias(np.zeros((0, 2)), np.zeros(0), np.zeros(0)) == 0.0


def test_conditional_scores_against_a_loop():
    logits, accepted, usable = simulated(400, np.random.default_rng(4), np.array([1.0, 2.0, 1.0]))
    survival = survival_probabilities(logits)
    for k, one in enumerate(score_conditional(survival, accepted, usable, bins=10)):
        rows = [r for r in range(400) if usable[r] >= k + 1 and accepted[r] >= k]
        p = [float(1 / (1 + np.exp(-logits[r, k]))) for r in rows]
        t = [bool(accepted[r] >= k + 1) for r in rows]
        assert one.weight == len(rows) > 50
        assert one.ece == pytest.approx(ece_loop(p, t, 10), abs=1e-9)
        assert one.brier == pytest.approx(np.mean(np.square(np.subtract(p, t))), abs=1e-9)
        assert one.observed == pytest.approx(np.mean(t))


def test_chance_error_is_what_exact_predictions_show():
    """The mean ECE of predictions whose events are drawn from themselves, over many fresh draws."""
    rng = np.random.default_rng(3)
    predicted = rng.random(500) * 0.5
    draws = [expected_calibration_error(predicted, rng.random(500) < predicted, 15) for _ in range(2000)]
    found = chance_error(predicted, 15, np.random.default_rng(1), draws=500)
    assert found == pytest.approx(np.mean(draws), abs=5 * np.std(draws) / np.sqrt(500))
    assert found > 0.02
