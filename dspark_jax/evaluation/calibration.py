"""How well the confidence head's probabilities hold: ECE, AUC, Brier score and reliability, by block position.

What is scored at position k is the survival of the prefix, prod_{i<=k} sigmoid(c_i), against whether the first k drafts
were accepted, over the rounds that verified at least k drafts (golden.md D.9). All of it in float64.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

EDGE = 1e-8
"""Probabilities are kept this far from 0 and 1."""


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Bins of predicted probability that are not empty, ascending.

    Attributes:
      lower, upper: [bins] edges.
      predicted: [bins] mean prediction.
      observed: [bins] share of accepted prefixes.
      weight: [bins] number of predictions.
    """

    lower: np.ndarray
    upper: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    weight: np.ndarray


@dataclasses.dataclass(frozen=True)
class PositionCalibration:
    """Scores of one block position; NaN where they are not defined.

    Attributes:
      weight: number of predictions.
      ece: expected calibration error, mean |predicted - observed| over the bins, weighted by their counts.
      auc: probability that an accepted prefix is predicted higher than a rejected one; needs both.
      brier: mean squared error.
      predicted: mean prediction.
      observed: share of accepted prefixes.
      reliability: the bins behind `ece`.
    """

    weight: float
    ece: float
    auc: float
    brier: float
    predicted: float
    observed: float
    reliability: Reliability


def survival_probabilities(confidence: np.ndarray) -> np.ndarray:
    """Predicted survival of every prefix: logits [..., G] -> prod_{i<=k} sigmoid(logit_i), float64."""
    logits = np.asarray(confidence, np.float64)
    return np.cumprod(np.exp(-np.logaddexp(0.0, -logits)), axis=-1)


def calibrate(
    confidence: np.ndarray, accepted: np.ndarray, proposed: np.ndarray, *, bins: int = 20, fine_bins: int = 1000
) -> list[PositionCalibration]:
    """Scores all block positions.

    Args:
      confidence: [R, G] logits of R rounds.
      accepted: [R] accepted drafts.
      proposed: [R] verified drafts; only positions up to it are scored.
      bins: of the reliability diagram and of ECE.
      fine_bins: of AUC.

    Returns:
      One per position, first position first.
    """
    predictions = survival_probabilities(confidence)
    scores = []
    for k in range(predictions.shape[1]):
        scored = proposed > k
        scores.append(score(predictions[scored, k], accepted[scored] > k, bins=bins, fine_bins=fine_bins))
    return scores


def score(predicted: np.ndarray, observed: np.ndarray, *, bins: int = 20, fine_bins: int = 1000) -> PositionCalibration:
    """Scores predictions [R] of events [R] (bool, or 0 and 1)."""
    predicted = np.clip(np.asarray(predicted, np.float64), EDGE, 1 - EDGE)
    observed = np.asarray(observed, np.float64)
    weight = len(predicted)
    nowhere = np.zeros(0)
    if not weight:
        nan = float("nan")
        return PositionCalibration(0.0, nan, nan, nan, nan, nan, Reliability(*(nowhere,) * 5))
    index = _bin(predicted, bins)
    counts = np.bincount(index, minlength=bins)
    used = counts > 0
    mean_predicted = np.bincount(index, predicted, minlength=bins)[used] / counts[used]
    mean_observed = np.bincount(index, observed, minlength=bins)[used] / counts[used]
    edges = np.arange(bins + 1) / bins
    return PositionCalibration(
        weight=float(weight),
        ece=float(np.sum(np.abs(mean_predicted - mean_observed) * counts[used]) / weight),
        auc=_auc(_bin(predicted, fine_bins), observed, fine_bins),
        brier=float(np.mean((predicted - observed) ** 2)),
        predicted=float(predicted.mean()),
        observed=float(observed.mean()),
        reliability=Reliability(edges[:-1][used], edges[1:][used], mean_predicted, mean_observed, counts[used]),
    )


def weighted_mean(scores: Sequence[PositionCalibration], name: str) -> float:
    """Mean of one score over the positions where it is defined, weighted by their predictions; NaN if there is none."""
    values = np.asarray([getattr(one, name) for one in scores], np.float64)
    weights = np.asarray([one.weight for one in scores], np.float64) * ~np.isnan(values)
    return float(np.sum(np.nan_to_num(values) * weights) / weights.sum()) if weights.sum() else float("nan")


def _bin(predicted: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((predicted * bins).astype(np.int64), bins - 1)


def _auc(index: np.ndarray, observed: np.ndarray, bins: int) -> float:
    """Area under the ROC curve of binned predictions; pairs within a bin count a half."""
    positive = np.bincount(index, observed, minlength=bins)
    negative = np.bincount(index, 1 - observed, minlength=bins)
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float(np.sum(positive * (below + 0.5 * negative)) / pairs) if pairs else float("nan")
