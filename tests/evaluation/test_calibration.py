import json
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.evaluation.calibration import (
    PositionCalibration,
    calibrate,
    score,
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
