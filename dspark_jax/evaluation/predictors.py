"""What can tell a scheduler how far drafts will hold: the confidence head, raw or calibrated, and the running estimate.

All of them are scored on the same rounds, and none has seen those: temperatures are fitted on other prompts, and the
running estimate (`engine.estimator`) has passed over the same other prompts before.
"""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.engine.estimator import AcceptanceEstimate, empty_estimate, restart, survival, update
from dspark_jax.evaluation.calibration import (
    BINS,
    PositionCalibration,
    chance_error,
    fit_bias,
    fit_temperatures,
    score_conditional,
    score_survival,
    survival_probabilities,
)
from dspark_jax.evaluation.traces import Traces

HEAD, CALIBRATED, SHIFTED, ONLINE = "head", "head+STS", "head+bias+STS", "online"
"""The confidence head, the same with fitted temperatures, with a fitted bias before those, the running estimate."""

DESCRIBED = {HEAD: "as trained", CALIBRATED: "after STS", SHIFTED: "after a shared bias and STS"}
"""What was done to the head."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Survival predicted by one predictor, and its scores by position.

    Attributes:
      survival: [R, G] float64.
      prefix: scores of the survival of drafts 1..k.
      conditional: scores of draft k where all before it were accepted.
      chance: [G] ECE of `prefix` that would be left to chance if the predictions were exactly right.
    """

    survival: np.ndarray
    prefix: list[PositionCalibration]
    conditional: list[PositionCalibration]
    chance: list[float]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Predictors on the rounds of `traces`.

    Attributes:
      traces: what is scored.
      fitted_rounds: rounds that the temperatures were fitted on.
      temperatures: [G] of `CALIBRATED`, or None without a confidence head.
      bias: of `SHIFTED`.
      shifted_temperatures: [G] of `SHIFTED`.
      predictors: by name; without a confidence head there is only `ONLINE`.
    """

    traces: Traces
    fitted_rounds: int
    temperatures: np.ndarray | None
    bias: float
    shifted_temperatures: np.ndarray | None
    predictors: Mapping[str, Predictor]

    def means(self, name: str, score: str, kind: str = "prefix") -> float:
        """Plain mean of a score over the positions at which it is defined, as the paper averages; NaN without any."""
        values = np.asarray([getattr(one, score) for one in getattr(self.predictors[name], kind)], np.float64)
        return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def compare_predictors(fit: Traces, report: Traces, *, bins: int = BINS, seed: int = 0) -> Calibration:
    """Fits temperatures and bias on the rounds of `fit` and scores all predictors on those of `report`.

    Args:
      fit: rounds of other prompts than `report` has.
      report: what is scored.
      bins: of ECE and of the reliability diagram.
      seed: order of the requests for the running estimate.
    """
    predicted: dict[str, np.ndarray] = {}
    temperatures, bias, shifted = None, 0.0, None
    if report.confidence is not None and fit.confidence is not None:
        temperatures = fit_temperatures(fit.confidence, fit.accepted, fit.usable, bins=bins)
        bias = fit_bias(fit.confidence, fit.accepted, fit.usable, bins=bins)
        shifted = fit_temperatures(fit.confidence + bias, fit.accepted, fit.usable, bins=bins)
        predicted[HEAD] = survival_probabilities(report.confidence)
        predicted[CALIBRATED] = survival_probabilities(report.confidence, temperatures)
        predicted[SHIFTED] = survival_probabilities(report.confidence + bias, shifted)
    predicted[ONLINE] = online_survival(report, warm_up=fit, seed=seed)
    predictors = {}
    for name, values in predicted.items():
        rng = np.random.default_rng(seed)
        predictors[name] = Predictor(
            survival=values,
            prefix=score_survival(values, report.accepted, report.usable, bins=bins),
            conditional=score_conditional(values, report.accepted, report.usable, bins=bins),
            chance=[chance_error(values[report.usable > k, k], bins, rng) for k in range(report.block_size)],
        )
    return Calibration(report, len(fit.accepted), temperatures, bias, shifted, predictors)


def calibration_data(calibration: Calibration) -> dict[str, Any]:
    """The scores in JSON types but for NaN and arrays: predictor -> kind -> score by position, means, bins."""
    described: dict[str, Any] = {}
    for name, one in calibration.predictors.items():
        described[name] = {"chance_ece": one.chance}
        for kind in ("prefix", "conditional"):
            rows = getattr(one, kind)
            scores = {s: [getattr(row, s) for row in rows] for s in (*SCORES, "predicted", "observed", "weight")}
            means = {s: calibration.means(name, s, kind) for s in SCORES}
            described[name][kind] = {"mean": means, **scores}
        described[name]["reliability"] = [vars(row.reliability) for row in one.prefix]
    return {
        "fitted_rounds": calibration.fitted_rounds,
        "scored_rounds": len(calibration.traces.accepted),
        "temperatures": calibration.temperatures,
        "bias": calibration.bias,
        "temperatures_with_bias": calibration.shifted_temperatures,
        "predictors": described,
    }


SCORES = ("ece", "auc", "brier")


def calibration_table(data: Mapping[str, Any], title: str) -> str:
    """What `calibrate` and `evaluate` print, from `calibration_data` as JSON holds it."""
    predictors = data["predictors"]
    width = max(22, *(len(name) + 2 for name in predictors))
    positions = len(next(iter(predictors.values()))["chance_ece"])

    def line(name: str, mean: float | None, values: Sequence[float | None], form: str, scale: float = 1.0) -> str:
        cells = ("-" if v is None else format(scale * v, form) for v in (mean, *values))
        return f"{name:{width}}" + "".join(f"{cell:>7}" for cell in cells)

    rounds = f"fitted on {data['fitted_rounds']} rounds, scored on {data['scored_rounds']} of other prompts"
    lines = [f"{title}: {rounds}"]
    lines.append(f"{'position':{width}}{'mean':>7}" + "".join(f"{k:7d}" for k in range(1, positions + 1)))
    if data["temperatures"] is not None:
        lines.append(line("temperatures (STS)", None, data["temperatures"], ".2f"))
        lines.append(line(f"  after bias {data['bias']:.2f}", None, data["temperatures_with_bias"], ".2f"))
    kinds = {"prefix": "survival of drafts 1..k", "conditional": "draft k, all before it accepted"}
    for kind, what in kinds.items():
        for score, name, form, scale in (
            ("ece", "ECE %", ".2f", 100.0),
            ("auc", "AUC", ".3f", 1),
            ("brier", "Brier", ".3f", 1),
        ):
            lines.append(f"{name}, {what}")
            for predictor, row in predictors.items():
                scores = row[kind]
                lines.append(line(f"  {predictor}", scores["mean"][score], scores[score], form, scale))
            if (kind, score) == ("prefix", "ece"):
                chance = predictors[CALIBRATED if CALIBRATED in predictors else ONLINE]["chance_ece"]
                lines.append(line("  (left to chance)", float(np.mean(chance)), chance, form, scale))
    return "\n".join(lines)


def online_survival(
    traces: Traces, *, warm_up: Traces | None = None, slots: int = 32, seed: int = 0, **settings: float
) -> np.ndarray:
    """The running estimate before each round, as a server with `slots` request slots would have it.

    Args:
      traces: rounds to predict; every draft of them was verified.
      warm_up: requests that the server has answered before.
      slots: requests decoded side by side; a free slot takes the next request.
      seed: shuffles the requests of each.
      settings: of `empty_estimate`.

    Returns:
      [R, G] float64 predicted survival.
    """
    parts = [part for part in (warm_up, traces) if part is not None]
    proposed = np.concatenate([part.proposed for part in parts])
    accepted = np.concatenate([part.accepted for part in parts])
    order = _in_slots(parts, slots, np.random.default_rng(seed))
    at_start = np.concatenate([_first_rounds(part) for part in parts])
    state = empty_estimate(slots, traces.block_size, **settings)
    active = order >= 0
    predicted = _run_estimate(
        state,
        jnp.asarray(proposed[order], jnp.int32),
        jnp.asarray(accepted[order], jnp.int32),
        jnp.asarray(active),
        jnp.asarray(at_start[order] & active),
    )
    out = np.zeros((len(proposed), traces.block_size))
    out[order[active]] = np.asarray(predicted, np.float64)[active]
    return out[len(out) - len(traces.accepted) :]


@jax.jit
def _run_estimate(
    state: AcceptanceEstimate, proposed: jax.Array, accepted: jax.Array, active: jax.Array, fresh: jax.Array
) -> jax.Array:
    """Predictions [T, B, G] before each of T rounds, whose outcomes are [T, B]."""

    def step(state: AcceptanceEstimate, row: tuple[jax.Array, ...]) -> tuple[AcceptanceEstimate, jax.Array]:
        proposed, accepted, active, fresh = row
        state = restart(state, fresh)
        return update(state, proposed, accepted, active), survival(state)

    return jax.lax.scan(step, state, (proposed, accepted, active, fresh))[1]


def _first_rounds(traces: Traces) -> np.ndarray:
    """[R] bool, the first round of a request."""
    first = np.ones(len(traces.request), bool)
    first[1:] = traces.request[1:] != traces.request[:-1]
    return first


def _in_slots(parts: list[Traces], slots: int, rng: np.random.Generator) -> np.ndarray:
    """Rounds [T, slots] in the order in which a server works them off, -1 where a slot is idle.

    The requests of a part come in random order, those of the first part first. Rounds are numbered over all parts.
    """
    free = [(0, slot) for slot in range(slots)]
    placed, offset = [], 0
    for part in parts:
        bounds = part.rounds_of
        for request in rng.permutation(len(part.prompt)):
            start, slot = heapq.heappop(free)
            length = int(bounds[request + 1] - bounds[request])
            placed.append((start, slot, int(bounds[request]) + offset, length))
            heapq.heappush(free, (start + length, slot))
        offset += len(part.accepted)
    steps = max(start for start, _ in free)
    order = np.full((steps, slots), -1, np.int64)
    for start, slot, first, length in placed:
        order[start : start + length, slot] = np.arange(first, first + length)
    return order
