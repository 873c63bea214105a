import numpy as np
import pytest

from dspark_jax.evaluation.threshold import sweep_thresholds
from dspark_jax.evaluation.traces import Traces


def make_traces(rng: np.random.Generator, confidence: bool = True) -> Traces:
    """30 requests of 15 prompts in two sets; some end in an accepted stop token, which leaves no bonus."""
    rounds = rng.integers(1, 6, 30)
    request = np.repeat(np.arange(30), rounds)
    count, size = len(request), 4
    accepted = rng.integers(0, size + 1, count)
    last = np.append(request[1:] != request[:-1], True)
    stopped = last & (accepted > 0) & (rng.random(count) < 0.5)
    proposed = np.where(stopped, accepted, size)
    emitted = accepted + ~stopped
    prompt = np.arange(30) // 2
    logits = rng.normal(0, 2, (count, size)).astype(np.float32) if confidence else None
    return Traces(size, ("a", "b"), prompt % 2, prompt, request, accepted, proposed, emitted, proposed, logits)


def test_against_a_loop():
    traces = make_traces(np.random.default_rng(0))
    assert traces.confidence is not None
    thresholds = (0.0, 0.3, 0.8)
    sweeps = sweep_thresholds(traces, 50, 0, thresholds)
    assert list(sweeps) == ["a", "b"]
    for number, one in enumerate(sweeps.values()):
        for s, least in enumerate(thresholds):
            verified = accepted = tokens = rounds = 0
            for r in range(len(traces.request)):
                if traces.prompt_set[traces.request[r]] != number:
                    continue
                cut = 0
                while cut < 4 and 1 / (1 + np.exp(-float(traces.confidence[r, cut]))) >= least:
                    cut += 1
                stop = traces.emitted[r] == traces.accepted[r]
                cut = min(cut, int(traces.proposed[r]))
                good = min(cut, int(traces.accepted[r]))
                rounds, verified, accepted = rounds + 1, verified + cut, accepted + good
                tokens += good + (0 if stop and good == traces.accepted[r] else 1)
            assert one.acceptance_rate[s] == pytest.approx(accepted / verified)
            assert one.verified[s] == pytest.approx(verified / rounds)
            assert one.tau[s] == pytest.approx(tokens / rounds)
            low, high = one.acceptance_rate_interval[:, s]
            assert low <= one.acceptance_rate[s] <= high and low < high
    rows = traces.prompt_set[traces.request] == 0
    assert sweeps["a"].tau[0] == pytest.approx(traces.emitted[rows].mean())  # threshold 0 is full verification


def test_nothing_verified_and_no_head():
    traces = make_traces(np.random.default_rng(1))
    one = sweep_thresholds(traces, 10, 0, (1.0,))["a"]
    assert np.isnan(one.acceptance_rate[0]) and one.verified[0] == 0 and one.tau[0] == 1
    assert sweep_thresholds(make_traces(np.random.default_rng(1), confidence=False), 10, 0) == {}
