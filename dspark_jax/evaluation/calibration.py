"""How well the confidence head's probabilities hold: ECE, AUC, Brier score and reliability, by block position.

What is scored at position k is the survival of the prefix, prod_{i<=k} sigmoid(c_i), against whether the first k drafts
were accepted, over the rounds that show it (`evaluation.traces`; the reference: those that verified at least k drafts,
golden.md D.9). All of it in float64. `fit_temperatures` is the paper's sequential temperature scaling (STS).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.errors import InputError
from dspark_jax.json_file import read_object

EDGE = 1e-8
"""Probabilities are kept this far from 0 and 1."""

BINS = 15
"""Bins of equal width over which temperatures are fitted and scored, as SGLang does."""

GRID = np.logspace(-1.0, 1.0, 41)
"""Temperatures that are tried at each position."""

SLACK = (0.1, 0.0005)
"""How much worse than the best ECE one may be and still count as equal: a tenth of it and 0.05 %."""

BIASES = sorted((step / 20 for step in range(-20, 21)), key=abs)
"""Shared biases that are tried, the smallest first."""


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
      reliability: the bins that `ece` is computed from.
    """

    weight: float
    ece: float
    auc: float
    brier: float
    predicted: float
    observed: float
    reliability: Reliability


def conditional_probabilities(confidence: np.ndarray, temperatures: np.ndarray | float = 1.0) -> np.ndarray:
    """Predicted conditional acceptance: logits [..., G] -> sigmoid(logit_k / T_k), float64.

    Args:
      confidence: logits of the confidence head.
      temperatures: [G] of `fit_temperatures`, or 1 for the head as it is.
    """
    logits = np.asarray(confidence, np.float64) / temperatures
    return np.exp(-np.logaddexp(0.0, -logits))


def survival_probabilities(confidence: np.ndarray, temperatures: np.ndarray | float = 1.0) -> np.ndarray:
    """Predicted survival of every prefix: logits [..., G] -> prod_{i<=k} sigmoid(logit_i / T_i), float64."""
    return np.cumprod(conditional_probabilities(confidence, temperatures), axis=-1)


def calibrate(
    confidence: np.ndarray, accepted: np.ndarray, proposed: np.ndarray, *, bins: int = 20, fine_bins: int = 1000
) -> list[PositionCalibration]:
    """Scores the confidence head as it is at all block positions.

    Args:
      confidence: [R, G] logits of R rounds.
      accepted: [R] accepted drafts.
      proposed: [R] only positions up to it are scored: drafts whose outcome is known.
      bins: of the reliability diagram and of ECE.
      fine_bins: of AUC.

    Returns:
      One per position, first position first.
    """
    survival = survival_probabilities(confidence)
    return score_survival(survival, accepted, proposed, bins=bins, fine_bins=fine_bins)


def score_survival(
    survival: np.ndarray, accepted: np.ndarray, usable: np.ndarray, *, bins: int = BINS, fine_bins: int = 1000
) -> list[PositionCalibration]:
    """Scores predicted survival [R, G] against whether drafts 1..k were accepted, in the rounds with usable >= k."""
    scores = []
    for k in range(survival.shape[1]):
        known = usable > k
        scores.append(score(survival[known, k], accepted[known] > k, bins=bins, fine_bins=fine_bins))
    return scores


def score_conditional(
    survival: np.ndarray, accepted: np.ndarray, usable: np.ndarray, *, bins: int = BINS, fine_bins: int = 1000
) -> list[PositionCalibration]:
    """Scores the conditional acceptance that survival [R, G] implies, a_k / a_{k-1}, where drafts 1..k-1 were accepted.

    Of the rounds with usable >= k only those count whose first k - 1 drafts were accepted.
    """
    before = np.concatenate([np.ones_like(survival[:, :1]), survival[:, :-1]], axis=1)
    predicted = survival / np.maximum(before, np.finfo(np.float64).tiny)
    scores = []
    for k in range(survival.shape[1]):
        known = (usable > k) & (accepted >= k)
        scores.append(score(predicted[known, k], accepted[known] > k, bins=bins, fine_bins=fine_bins))
    return scores


def fit_temperatures(
    confidence: np.ndarray, accepted: np.ndarray, usable: np.ndarray, *, bins: int = BINS, exact: bool = False
) -> np.ndarray:
    """Sequential temperature scaling (paper section 3.2.2).

    For k = 1..G in order, T_k is searched on a grid (41 points from 0.1 to 10, equally spaced in the logarithm) for the
    ECE of prod_{i<=k} sigmoid(logit_i / T_i) with the earlier temperatures fixed. Not the smallest ECE is taken, as the
    paper does, but the T_k nearest to 1 whose ECE is as good up to `SLACK`: few rounds reach the later positions, there
    the smallest ECE is mostly chance, and the extreme temperatures that come with it (0.3, 8) spoil the order of the
    requests without a better ECE on other prompts. A finer grid does not help there either.

    Args:
      confidence: [R, G] logits of R rounds.
      accepted: [R] accepted drafts.
      usable: [R] positions whose outcome is known.
      bins: of equal width, for ECE.
      exact: take the smallest ECE.

    Returns:
      [G] temperatures; 1 where no round shows the position.
    """
    relative, absolute = (0.0, 0.0) if exact else SLACK
    logits = np.asarray(confidence, np.float64)
    grid = GRID[np.argsort(np.abs(np.log(GRID)), kind="stable")]
    temperatures = np.ones(logits.shape[1])
    prefix = np.ones(len(logits))
    for k in range(logits.shape[1]):
        known = usable > k
        if known.any():
            observed = (accepted[known] > k).astype(np.float64)
            predictions = (prefix[known] * conditional_probabilities(logits[known, k], t) for t in grid)
            errors = np.asarray([expected_calibration_error(p, observed, bins) for p in predictions])
            temperatures[k] = grid[int(np.argmax(errors <= errors.min() * (1 + relative) + absolute))]
        prefix = prefix * conditional_probabilities(logits[:, k], temperatures[k])
    return temperatures


def fit_bias(confidence: np.ndarray, accepted: np.ndarray, usable: np.ndarray, *, bins: int = BINS) -> float:
    """The number in -1..1 (steps of 0.05) that, added to all logits, minimises the mean ECE over the positions.

    A head is trained on prompts that its drafter is trained on too, and expects as much of others. Temperatures cannot
    mend that: they leave a logit of 0 where it is. A shared bias can, and it needs nothing of a server, because it can
    be added to the bias of the exported head.
    """
    logits = np.asarray(confidence, np.float64)

    def error(bias: float) -> float:
        survival = survival_probabilities(logits + bias)
        known = [usable > k for k in range(logits.shape[1])]
        errors = [
            expected_calibration_error(survival[rows, k], accepted[rows] > k, bins)
            for k, rows in enumerate(known)
            if rows.any()
        ]
        return float(np.mean(errors)) if errors else 0.0

    return float(min(BIASES, key=error))


def expected_calibration_error(predicted: np.ndarray, observed: np.ndarray, bins: int) -> float:
    """Mean |mean prediction - share observed| over bins of equal width, weighted by their counts; NaN without any.

    Args:
      predicted: [R] probabilities.
      observed: [R] 0 or 1.
      bins: number of bins on [0, 1].
    """
    if not len(predicted):
        return float("nan")
    predicted = np.clip(predicted, EDGE, 1 - EDGE)
    excess = np.bincount(_bin(predicted, bins), predicted - observed, minlength=bins)
    return float(np.abs(excess).sum() / len(predicted))


def chance_error(predicted: np.ndarray, bins: int, rng: np.random.Generator, draws: int = 50) -> float:
    """ECE that predictions [R] would show on average if they were exactly right: what finitely many rounds leave."""
    errors = [expected_calibration_error(predicted, rng.random(len(predicted)) < predicted, bins) for _ in range(draws)]
    return float(np.mean(errors))


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
        ece=expected_calibration_error(predicted, observed, bins),
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


def read_calibration(file: Path, block_size: int) -> dict[str, Any]:
    """Bias and temperatures as `calibrate` wrote them; temperatures alone from SGLang's own files.

    Returns:
      `temperatures` (`block_size` of them) and `bias` (None without one); nothing where there is no such file.

    Raises:
      InputError: it cannot be read, or holds something else.
    """
    if not file.exists():
        return {}
    again = "run calibrate again, or remove it"
    content = read_object(file, "", again)
    try:
        biased = content.get("temperatures_with_bias") is not None
        found = [float(v) for v in content["temperatures_with_bias" if biased else "temperatures"]]
        bias = float(content["bias"]) if biased else None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: no calibration ({type(error).__name__}: {error}); {again}") from None
    if len(found) != block_size or min(found) <= 0 or not np.isfinite([*found, bias or 0.0]).all():
        raise InputError(f"{file}: has {len(found)} temperatures; {block_size} positive ones are needed, {again}")
    return {"temperatures": found, "bias": bias}
