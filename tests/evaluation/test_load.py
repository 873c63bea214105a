import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.config import InputError
from dspark_jax.evaluation.load import (
    Contender,
    CostTable,
    Forecasts,
    Users,
    contenders,
    fixed_policy,
    load_curves,
    load_data,
    load_table,
    read_cost_table,
    replay,
    saturating,
    threshold_policy,
)
from dspark_jax.evaluation.predictors import CALIBRATED, HEAD, ONLINE, SHIFTED, compare_predictors
from dspark_jax.evaluation.traces import Traces

SIZE = 4


def make_traces(requests: int = 80, seed: int = 0, *, confidence: bool = True) -> Traces:
    """Rounds whose drafts survive as a calibrated head says; requests end in an accepted stop token or at a budget."""
    rng = np.random.default_rng(seed)
    rounds = rng.integers(1, 9, requests)
    request = np.repeat(np.arange(requests), rounds)
    logits = rng.normal(0.3, 1.5, (requests, 1))[request] + rng.normal(0, 1, (len(request), SIZE))
    accepted = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).cumprod(axis=1).sum(axis=1)
    last = np.append(request[1:] != request[:-1], True)
    stopped = last & (accepted > 0) & (np.arange(len(request)) % 2 == 0)
    proposed = np.where(stopped, accepted, SIZE)
    head = logits.astype(np.float32) if confidence else None
    emitted, prompt = accepted + ~stopped, np.arange(requests)
    return Traces(SIZE, ("a",), prompt * 0, prompt, request, accepted, proposed, emitted, proposed, head)


def test_plain_decoding_and_full_verification_are_exact():
    """Plain: one token per request and step, at the table's rate. Full: with requests that all look alike, the recorded
    accepted length at the recorded cost."""
    table = CostTable("x", np.linspace(30, 10, 101), draft_seconds=0.02)
    traces = make_traces()
    none = np.zeros((len(traces.accepted), SIZE))
    point = replay(traces, Contender(fixed_policy(0), none, drafts=False), table, 7, steps=50)
    assert point.tokens_per_second == pytest.approx(7 * table.steps_per_second[7])
    assert (point.budget, point.accepted_length) == (1, 1)
    assert point.per_user == pytest.approx(table.steps_per_second[7])

    same = np.tile([2, 0, 4], 30)
    ends = np.tile([4, 4, 4], 30)
    alike = Traces(
        SIZE, ("a",), np.zeros(30, int), np.arange(30), np.repeat(np.arange(30), 3), same, ends, same + 1, ends, None
    )
    point = replay(alike, Contender(fixed_policy(SIZE), none), table, 6, steps=99)
    seconds = 1 / table.steps_per_second[6 * 5] + 0.02
    # Every request repeats 3, 1, 5 tokens; 99 steps are 33 repetitions for each user, wherever it started.
    assert point.accepted_length == pytest.approx(3)
    assert point.tokens_per_second == pytest.approx(6 * 3 / seconds)
    assert point.budget == 5


def test_users_against_a_loop():
    """Tokens are conserved: every request commits exactly what was recorded, under any lengths."""
    traces, rng = make_traces(), np.random.default_rng(4)
    users = Users(traces, 5, np.random.default_rng(1))
    bounds = traces.rounds_of
    totals = [traces.emitted[bounds[i] : bounds[i + 1]].sum() for i in range(len(traces.prompt))]
    state = [(int(users.request[u]), int(users.round[u]), int(users.remaining[u])) for u in range(5)]
    for _ in range(200):
        lengths = rng.integers(0, SIZE + 1, 5)
        committed = users.step(lengths)
        expected = 0
        for u in range(5):
            request, number, left = state[u]
            assert bounds[request] <= number < bounds[request + 1] and 0 < left <= totals[request]
            tokens = min(min(int(lengths[u]), int(traces.accepted[number])) + 1, left)
            expected += tokens
            number = number + 1 if number + 1 < bounds[request + 1] else int(bounds[request])
            state[u] = (request, number, left - tokens)
            if left == tokens:
                assert users.fresh[u]
                request = int(users.request[u])
                state[u] = (request, int(bounds[request]), int(totals[request]))
            assert (users.request[u], users.round[u], users.remaining[u]) == state[u]
        assert committed == expected


def test_old_forecasts_are_two_rounds_old_and_average_for_new_requests():
    traces = make_traces()
    predicted = np.cumprod(np.random.default_rng(0).random((len(traces.accepted), SIZE)), axis=1)
    users, forecasts = Users(traces, 3, np.random.default_rng(2)), Forecasts(traces, predicted, 3)
    history: list[list[np.ndarray]] = [[], [], []]
    checked = [0, 0]
    for step in range(60):
        live, old = forecasts.before(users)
        assert live.shape == old.shape == (16, SIZE)  # padded
        for u in range(3):
            if users.fresh[u]:
                history[u] = []
            np.testing.assert_allclose(live[u], predicted[users.round[u]], rtol=1e-6)
            if step >= 2:
                known = len(history[u]) >= 2
                np.testing.assert_allclose(old[u], history[u][-2] if known else predicted.mean(axis=0), rtol=1e-6)
                checked[known] += 1
            history[u].append(live[u].copy())
        users.step(np.array([SIZE, SIZE, 0]))
    assert min(checked) > 5


@pytest.fixture(scope="module")
def calibration():
    return compare_predictors(make_traces(300, 1), make_traces(300, 2))


def test_one_user_has_the_speed_of_all_requests(calibration):
    """Not that of those that happen to come, however much they differ."""
    everything = contenders(calibration)["fixed 4"]
    for seed in range(3):
        found = replay(calibration.traces, everything, saturating(50), 1, seed=seed)
        assert found.accepted_length == pytest.approx(calibration.traces.emitted.mean(), rel=0.015)


def test_every_request_is_dealt_before_any_comes_again():
    traces = make_traces(10)
    users = Users(traces, 4, np.random.default_rng(0))
    dealt = np.concatenate([users.request, *(users.deal(count) for count in (3, 1, 2, 9, 1))])
    for start in (0, 10):
        assert sorted(dealt[start : start + 10]) == list(range(10))
    assert dealt[:10].tolist() != dealt[10:].tolist()


def test_schedulers_lose_to_nobody_on_a_saturating_table(calibration):
    """A knee at 16 tokens: from 1 to 20 users both regimes occur. A scheduler that verifies nothing extra is plain
    decoding and one that verifies all is `fixed`, with the same random requests, so equality is exact at the ends."""
    table = saturating(100, knee=16, steps_per_second=10)
    curves = load_curves(calibration, table, concurrencies=(1, 2, 4, 8, 12, 20), steps=500)
    assert list(curves) == [
        "plain", "fixed 2", "fixed 4", f"early stop, {HEAD}", f"early stop, {CALIBRATED}", f"early stop, {SHIFTED}",
        f"early stop, {ONLINE}", f"lagged, {SHIFTED}", f"threshold 0.5, {SHIFTED}",
    ]  # fmt: skip
    data = load_data(curves, table, SIZE)
    for name, row in data["checks"].items():
        assert row["least_ratio_to_plain"] >= 1.0, name
        assert row["ratio_to_fixed_at_fewest_users"] == pytest.approx(1.0, abs=0.02), name
        assert row["ratio_to_fixed_at_most_users"] > 1.5, name
    budgets = np.array([point.budget for point in curves[f"early stop, {SHIFTED}"]])
    assert budgets[0] > 4.9 and budgets[-1] == 1 and np.all(np.diff(budgets) <= 1e-9)
    knows = curves[f"early stop, {HEAD}"][3].tokens_per_second
    assert knows > curves[f"early stop, {ONLINE}"][3].tokens_per_second > curves["plain"][3].tokens_per_second
    lines = load_table(data).splitlines()
    assert len(lines) == 1 + 2 * (1 + len(curves)) + len(data["checks"])
    assert f"{curves['plain'][3].tokens_per_second:7.0f}" in next(line for line in lines if line.startswith("plain"))


def test_without_a_head_the_running_estimate_schedules():
    traces = [make_traces(60, seed, confidence=False) for seed in (1, 2)]
    assert list(contenders(compare_predictors(*traces))) == [
        "plain", "fixed 2", "fixed 4", f"early stop, {ONLINE}", f"lagged, {ONLINE}", f"threshold 0.5, {ONLINE}"
    ]  # fmt: skip


def test_drafting_costs_only_those_who_draft(calibration):
    free, costly = (saturating(50, knee=16, draft_share=share) for share in (0.0, 0.25))
    traces, found = calibration.traces, contenders(calibration)
    points = {n: [replay(traces, found[n], t, 2, steps=40) for t in (free, costly)] for n in ("plain", "fixed 4")}
    assert points["plain"][0] == points["plain"][1]
    ratio = points["fixed 4"][0].tokens_per_second / points["fixed 4"][1].tokens_per_second
    assert ratio == pytest.approx(1.25)
    assert "drafting 25% of a step" in costly.name and "drafting" not in free.name


def test_concurrencies_beyond_the_table_are_left_out(calibration):
    curves = load_curves(calibration, saturating(10), concurrencies=(1, 2, 3), steps=40)
    assert [point.concurrency for point in curves["plain"]] == [1, 2]


def test_plain_decoding_has_its_own_times_where_they_were_measured(calibration):
    """Not those of a round with drafts that verifies as many tokens, nor more users than were measured."""
    table = CostTable("x", np.full(51, 5.0), plain=np.array([0.0, 20.0, 10.0, 8.0]))
    curves = load_curves(calibration, table, concurrencies=(1, 2, 3, 4), steps=40)
    assert [point.concurrency for point in curves["plain"]] == [1, 2, 3]
    assert [point.tokens_per_second for point in curves["plain"]] == pytest.approx([20, 20, 24])
    point = curves["fixed 4"][1]
    assert point.tokens_per_second == pytest.approx(2 * 5 * point.accepted_length)


def test_threshold_policy():
    live = np.array([[0.9, 0.6, 0.2, 0.19], [0.4, 0.39, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0]])
    active = np.array([True, True, False])
    # Conditionals of the first: 0.9, 0.67, 0.33; of the second: 0.4.
    assert threshold_policy(0.5)(live, live, np.ones(9), active).tolist() == [2, 0, 0]
    assert threshold_policy(0.0)(live, live, np.ones(9), active).tolist() == [4, 4, 0]


def test_saturating_shape():
    table = saturating(40, knee=10, steps_per_second=5)
    assert table.invented and not CostTable("x", table.steps_per_second).invented
    assert table.most_tokens == 40
    np.testing.assert_allclose(table.steps_per_second[[1, 10, 20, 40]], [5, 5, 2.5, 1.25])


def write(path: Path, **content) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_cost_table_is_a_floor_lookup(tmp_path: Path):
    path = tmp_path / "costs.json"
    table = read_cost_table(
        write(path, sample_batch_tokens=[2, 5], sample_steps_per_sec=[9.0, 4.0], max_batch_tokens=7)
    )
    assert table.steps_per_second.tolist() == [9, 9, 9, 9, 9, 4, 4, 4] and table.name == "costs.json"
    np.testing.assert_allclose(dataclasses.replace(table, draft_seconds=0.25).speculative[5], 2.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"sample_batch_tokens": [1]}, "KeyError"),
        ({"sample_batch_tokens": [], "sample_steps_per_sec": []}, "IndexError"),
        ({"sample_batch_tokens": ["a"], "sample_steps_per_sec": [1]}, "ValueError"),
        ({"sample_batch_tokens": [1, 2], "sample_steps_per_sec": [1]}, "must ascend"),
        ({"sample_batch_tokens": [2, 1], "sample_steps_per_sec": [1, 1]}, "must ascend"),
        ({"sample_batch_tokens": [4], "sample_steps_per_sec": [1], "max_batch_tokens": 3}, "max_batch_tokens=3"),
        ({"sample_batch_tokens": [1], "sample_steps_per_sec": [0]}, "positive"),
        ({"sample_batch_tokens": [1], "sample_steps_per_sec": [float("nan")]}, "positive"),
    ],
)
def test_bad_cost_tables_are_one_line(tmp_path: Path, content: dict, expected: str):
    path = write(tmp_path / "costs.json", **content)
    with pytest.raises(InputError, match=expected) as error:
        read_cost_table(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unreadable_cost_tables(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        read_cost_table(tmp_path / "missing.json")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match="no cost table"):
        read_cost_table(tmp_path / "x.json")
