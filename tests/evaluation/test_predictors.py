import json

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.engine.estimator import empty_estimate, restart, survival, update
from dspark_jax.evaluation.calibration import fit_temperatures, survival_probabilities
from dspark_jax.evaluation.predictors import (
    CALIBRATED,
    HEAD,
    ONLINE,
    SHIFTED,
    calibration_data,
    calibration_table,
    compare_predictors,
    online_survival,
)
from dspark_jax.evaluation.traces import Traces
from dspark_jax.json_file import write_json

SIZE = 3


def make_traces(requests: int, seed: int, *, confidence: bool = True) -> Traces:
    """Requests of very different quality; the head's logits know the quality but are twice too large."""
    rng = np.random.default_rng(seed)
    rounds = rng.integers(0, 12, requests)
    request = np.repeat(np.arange(requests), rounds)
    logits = rng.normal(0.5, 1.0, (requests, 1))[request] + rng.normal(0, 1, (len(request), SIZE))
    accepted = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).cumprod(axis=1).sum(axis=1)
    full = np.full(len(request), SIZE)
    head = (2 * logits).astype(np.float32) if confidence else None
    prompt = np.arange(requests)
    return Traces(SIZE, ("a",), np.zeros(requests, int), prompt, request, accepted, full, accepted + 1, full, head)


def test_online_survival_is_the_running_estimate_of_one_slot():
    """With one slot and one request after the other, step by step and without the scan."""
    traces = make_traces(5, 0)
    found = online_survival(traces, slots=1, seed=3, strength=2.0)
    state, bounds = empty_estimate(1, SIZE, strength=2.0), traces.rounds_of
    on = jnp.array([True])
    for request in np.random.default_rng(3).permutation(5):
        for number in range(bounds[request], bounds[request + 1]):
            state = restart(state, jnp.array([number == bounds[request]]))
            np.testing.assert_allclose(found[number], survival(state)[0], rtol=1e-6)
            state = update(state, traces.proposed[number : number + 1], traces.accepted[number : number + 1], on)


def test_online_survival_of_a_round_ignores_what_comes_later():
    """Changing the outcome of a request's last round changes no forecast of that request."""
    traces = make_traces(40, 1)
    request = int(np.flatnonzero(np.diff(traces.rounds_of) > 3)[0])
    last = traces.rounds_of[request + 1] - 1
    accepted = traces.accepted.copy()
    accepted[last] = SIZE - accepted[last]
    other = Traces(**{**vars(traces), "accepted": accepted})
    rows = traces.request == request
    before, after = (online_survival(one, slots=4) for one in (traces, other))
    np.testing.assert_array_equal(before[rows], after[rows])
    assert not np.array_equal(before, after)  # later rounds of others are told by the rate of all


def test_every_round_is_predicted_once_and_a_warm_up_counts():
    traces, earlier = make_traces(50, 2), make_traces(60, 3)
    found = online_survival(traces, warm_up=earlier, slots=7)
    assert found.shape == (len(traces.accepted), SIZE)
    assert np.all(found > 0) and np.all(np.diff(found, axis=1) <= 0)
    cold = online_survival(traces, slots=7)
    # Without a warm-up the first forecasts are the prior.
    assert np.any(np.isclose(cold[:, 0], 0.5)) and not np.any(np.isclose(found[:, 0], 0.5, atol=1e-6))


def test_comparison_fits_on_one_part_and_scores_the_other():
    fit, scored = make_traces(400, 4), make_traces(400, 5)
    result = compare_predictors(fit, scored)
    assert list(result.predictors) == [HEAD, CALIBRATED, SHIFTED, ONLINE]
    assert fit.confidence is not None and scored.confidence is not None
    expected = fit_temperatures(fit.confidence, fit.accepted, fit.usable)
    np.testing.assert_array_equal(result.temperatures, expected)
    np.testing.assert_allclose(expected, 2.0, rtol=0.5)
    survivals = survival_probabilities(scored.confidence, expected)
    np.testing.assert_array_equal(result.predictors[CALIBRATED].survival, survivals)
    assert result.means(CALIBRATED, "ece") < result.means(HEAD, "ece")
    assert result.means(HEAD, "auc") > result.means(ONLINE, "auc") > 0.55
    assert result.means(HEAD, "ece") == pytest.approx(np.mean([one.ece for one in result.predictors[HEAD].prefix]))
    assert result.fitted_rounds == len(fit.accepted)


def test_without_a_head_only_the_running_estimate_is_scored():
    result = compare_predictors(make_traces(60, 6, confidence=False), make_traces(60, 7, confidence=False))
    assert list(result.predictors) == [ONLINE] and result.temperatures is None


@pytest.mark.parametrize("confidence", [True, False])
def test_table_and_data(confidence: bool, tmp_path):
    result = compare_predictors(make_traces(80, 8, confidence=confidence), make_traces(80, 9, confidence=confidence))
    data = write_json(tmp_path / "x.json", calibration_data(result))
    assert data == json.loads((tmp_path / "x.json").read_text())
    lines = calibration_table(data, "run, temperature 1").splitlines()
    assert f"fitted on {result.fitted_rounds} rounds, scored on {len(result.traces.accepted)}" in lines[0]
    ece = [100 * one.ece for one in result.predictors[ONLINE].prefix]
    row = "  online" + " " * 14 + "".join(f"{v:7.2f}" for v in [np.mean(ece), *ece])
    assert row in lines
    assert any(line.startswith("temperatures") for line in lines) == confidence
    if confidence:
        assert data["predictors"][HEAD]["prefix"]["ece"] == [one.ece for one in result.predictors[HEAD].prefix]
